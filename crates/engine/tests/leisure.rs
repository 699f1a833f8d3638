//! When a device thread may carry its answer on, and that it may do anything then.

mod rig;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};

use pirouette_engine::{Engine, Pending, take_leisure};
use rig::{eventually, request};

/// What a waiter does when its answer is there.
struct Waiter(Mutex<Box<dyn FnMut() + Send>>);

impl Wake for Waiter {
    fn wake(self: Arc<Self>) {
        (self.0.lock().unwrap())();
    }
}

/// Has `then` called by whoever brings the answer.
fn once_answered(pending: &mut Pending, then: impl FnMut() + Send + 'static) {
    let waker = Waker::from(Arc::new(Waiter(Mutex::new(Box::new(then)))));
    let polled = Future::poll(std::pin::Pin::new(pending), &mut Context::from_waker(&waker));
    assert!(polled.is_pending(), "the device takes a while");
}

/// Submits a request; the flag tells what its waiter was told.
fn ask(engine: &Engine, i: usize) -> (Pending, Arc<Mutex<Vec<bool>>>) {
    let mut pending = engine.submit(request(i)).unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = told.clone();
    once_answered(&mut pending, move || tell.lock().unwrap().push(take_leisure()));
    (pending, told)
}

#[tokio::test]
async fn a_device_has_leisure_for_a_request_that_is_alone() {
    let engine = rig::engine(&[(1, 200.0), (2, 200.0)], rig::options(2));
    engine.wait_ready().await.unwrap();
    let (_alone, told) = ask(&engine, 0);
    eventually("answered alone", || *told.lock().unwrap() == [true]).await;
    // One runs, two wait for it and run together.
    let (_first, told) = ask(&engine, 1);
    eventually("the first runs", || engine.stats().queue_depth == 0).await;
    let (second, second_told) = ask(&engine, 2);
    let (third, third_told) = ask(&engine, 3);
    eventually("answered while others wait", || *told.lock().unwrap() == [false]).await;
    eventually("answered together", || {
        *second_told.lock().unwrap() == [false] && *third_told.lock().unwrap() == [false]
    })
    .await;
    assert!(second.await.is_ok() && third.await.is_ok());
    assert_eq!(engine.stats().batches.get(&2), Some(&1));
}

#[tokio::test]
async fn a_device_thread_may_be_the_last_to_let_go_of_its_engine() {
    let engine = Arc::new(rig::engine(&[(1, 200.0)], rig::options(1)));
    engine.wait_ready().await.unwrap();
    let gone = Arc::new(AtomicBool::new(false));
    let mut pending = engine.submit(request(0)).unwrap();
    let (mut last, went) = (Some(engine), gone.clone());
    once_answered(&mut pending, move || {
        assert!(take_leisure());
        drop(last.take().and_then(Arc::into_inner).expect("nobody else has it"));
        went.store(true, SeqCst);
    });
    eventually("the engine is gone", || gone.load(SeqCst)).await;
    assert!(pending.await.is_ok());
}
