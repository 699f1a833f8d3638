//! Weights replaced while requests come in: nobody fails, nobody gets a mixture.

mod rig;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use pirouette_engine::{
    Engine, EngineError, EngineOptions, Fault, NullDevice, NullTimes, SwapError,
};
use pirouette_model::{BackendError, WeightTable};
use rig::{eventually, expected, request};

const PATIENCE: Duration = Duration::from_secs(20);

fn successor(
    old: &Engine,
    device: &NullDevice,
    options: EngineOptions,
) -> Result<(Engine, pirouette_engine::SwapReport), SwapError> {
    old.successor(vec![rig::factory(device)], options, PATIENCE)
}

fn quick() -> NullDevice {
    NullDevice::new(NullTimes(vec![(1, 2.0), (4, 4.0)]))
}

/// Waits until nobody uses the engine any more, then ends it.
fn retire(engine: Arc<Engine>) {
    let mut engine = Some(engine);
    while let Some(shared) = engine.take() {
        engine = Arc::try_unwrap(shared).err();
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_swaps_under_load_fail_no_request() {
    // Batches of 4 in 4 ms are 1000 requests a second at most; eight clients that rest between
    // requests ask for less.
    let first = rig::engine(&[(1, 2.0), (4, 4.0)], rig::options(4));
    first.wait_ready().await.unwrap();
    let current = Arc::new(RwLock::new(Arc::new(first)));
    let over = Arc::new(AtomicBool::new(false));
    let mut clients = Vec::new();
    for client in 0..8 {
        let (current, over) = (current.clone(), over.clone());
        clients.push(tokio::spawn(async move {
            let mut good = 0u64;
            while !over.load(SeqCst) {
                let engine = current.read().unwrap().clone();
                let answer = engine.submit(request(client)).unwrap().await.unwrap();
                assert_eq!(answer.actions, expected(&request(client), client as u64));
                good += 1;
                tokio::time::sleep(Duration::from_millis(4)).await;
            }
            good
        }));
    }
    for _ in 0..100 {
        let current = current.clone();
        let swap = move || {
            let old = current.read().unwrap().clone();
            let (new, report) = successor(&old, &quick(), rig::options(4)).unwrap();
            assert_eq!((report.devices, report.changed), (1, false));
            *current.write().unwrap() = Arc::new(new);
            retire(old);
        };
        tokio::task::spawn_blocking(swap).await.unwrap();
    }
    over.store(true, SeqCst);
    let mut good = 0;
    for client in clients {
        good += client.await.unwrap();
    }
    let stats = current.read().unwrap().stats();
    assert_eq!(stats.completed, good, "the counts go on over a hundred engines");
    assert!(stats.errors.is_empty() && good > 100, "{stats:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_prove_itself_is_rolled_back() {
    let old = rig::engine(&[(1, 1.0)], rig::options(1));
    old.wait_ready().await.unwrap();
    let old = &old;
    let refused = |device: NullDevice, options: EngineOptions| {
        tokio::task::block_in_place(|| successor(old, &device, options).err().unwrap())
    };
    let device = |fault: fn(u64) -> Option<Fault>| quick().with_faults(fault);
    // Runs: two to warm up, then the canary twice.
    let unstable = refused(device(|run| (run == 3).then_some(Fault::Flip)), rig::options(1));
    assert!(unstable.to_string().contains("canary: value 0"), "{unstable}");
    let infinite = refused(device(|run| (run == 2).then_some(Fault::Nan(0))), rig::options(1));
    let says = "is NaN: the weights or the device are broken";
    assert!(infinite.to_string().contains(says), "{infinite}");
    let dead = refused(device(|_| Some(Fault::Panic)), rig::options(1));
    assert!(matches!(&dead, SwapError::Device(why) if why.contains("panic")), "{dead}");
    let mut known = rig::options(1);
    known.canary.expected = Some(vec![1.0; 20]);
    let other = refused(quick(), known);
    assert!(other.to_string().contains("known to be 1"), "{other}");
    let mut longer = rig::options(1);
    longer.horizon += 1;
    let contract = refused(quick(), longer);
    assert!(matches!(&contract, SwapError::Contract(_)), "{contract}");
    let mut steps = rig::options(1);
    steps.tables = vec![Arc::new(WeightTable::new(rig::config(), 4))];
    assert!(matches!(refused(quick(), steps), SwapError::Contract(_)));
    let missing = tokio::task::block_in_place(|| {
        let open = || Err(BackendError::Unavailable("no such file".into()));
        old.successor(vec![Arc::new(open)], rig::options(1), PATIENCE).err().unwrap()
    });
    assert_eq!(missing, SwapError::Device("no such file".into()));
    let answer = old.submit(request(1)).unwrap().await.unwrap();
    assert_eq!(answer.actions, expected(&request(1), 1), "the old weights serve on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_loads_for_ever_is_given_up_and_other_weights_are_told() {
    let old = rig::engine(&[(1, 1.0)], rig::options(1));
    old.wait_ready().await.unwrap();
    let slow = || {
        std::thread::sleep(Duration::from_millis(500));
        Err(BackendError::Unavailable("late".into()))
    };
    let patience = Duration::from_millis(50);
    let error = tokio::task::block_in_place(|| {
        old.successor(vec![Arc::new(slow)], rig::options(1), patience).err().unwrap()
    });
    assert_eq!(error, SwapError::TimedOut(patience));
    // A wrong bit in every forward: as other weights would answer, and stably so.
    let device = quick().with_faults(|_| Some(Fault::Flip));
    let (new, report) =
        tokio::task::block_in_place(|| successor(&old, &device, rig::options(1)).unwrap());
    assert!(report.changed);
    eventually("served", || !new.stats().devices.is_empty()).await;
    assert!(old.submit(request(1)).unwrap().await.is_ok());
    assert!(!matches!(new.submit(request(1)), Err(EngineError::Unavailable(_))));
}
