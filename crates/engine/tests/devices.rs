//! Several devices behind one queue: who takes what, and what a dead one costs.

mod rig;

use std::time::Duration;

use pirouette_engine::{Engine, EngineError, Fault, NullDevice, NullTimes, Phase, Request};
use rig::{eventually, expected, request};

async fn all_ready(engine: &Engine) {
    eventually("all ready", || engine.stats().devices.iter().all(|d| d.phase == Phase::Ready))
        .await;
}

fn pair(first_ms: f64, second_ms: f64) -> Engine {
    let devices =
        [first_ms, second_ms].map(|ms| rig::factory(&NullDevice::new(NullTimes::constant(ms))));
    Engine::start(devices.to_vec(), rig::options(1)).unwrap()
}

#[tokio::test]
async fn equal_devices_share_the_queue() {
    let engine = pair(20.0, 20.0);
    all_ready(&engine).await;
    let pending: Vec<_> = (0..8).map(|i| engine.submit(request(i)).unwrap()).collect();
    let mut served = [0; 2];
    for pending in pending {
        served[pending.await.unwrap().timing.device] += 1;
    }
    assert!(served.iter().all(|n| (3..=5).contains(n)), "{served:?}");
}

#[tokio::test]
async fn idle_devices_split_what_waits() {
    let table = NullTimes(vec![(1, 40.0), (8, 320.0)]);
    let devices = [(); 2].map(|()| rig::factory(&NullDevice::new(table.clone())));
    let mut options = rig::options(8);
    // Both wait for eight, and then find eight.
    options.window = Duration::from_millis(300);
    let engine = Engine::start(devices.to_vec(), options).unwrap();
    all_ready(&engine).await;
    let pending: Vec<_> = (0..8).map(|i| engine.submit(request(i)).unwrap()).collect();
    let mut served = [0; 2];
    for pending in pending {
        let timing = pending.await.unwrap().timing;
        assert!(timing.batch <= 4, "{timing:?}");
        served[timing.device] += 1;
    }
    assert!(served.iter().all(|n| *n > 0), "{served:?}");
}

#[tokio::test]
async fn a_slow_device_leaves_a_request_to_a_fast_one_that_finishes_it_sooner() {
    let engine = pair(600.0, 20.0);
    all_ready(&engine).await;
    // One at a time: the slow one is always free, and never the sooner.
    for i in 0..5 {
        let timing = engine.submit(request(i)).unwrap().await.unwrap().timing;
        assert_eq!(timing.device, 1, "{timing:?}");
    }
    // Far more than the fast one finishes in 600 ms: the slow one takes its share, from the back.
    let pending: Vec<_> = (0..60).map(|i| engine.submit(request(i)).unwrap()).collect();
    let mut slow = Vec::new();
    for (i, pending) in pending.into_iter().enumerate() {
        if pending.await.unwrap().timing.device == 0 {
            slow.push(i);
        }
    }
    assert!(!slow.is_empty() && slow.iter().all(|i| *i > 5), "taken by the slow one: {slow:?}");
}

#[tokio::test]
async fn a_deadline_only_the_fast_device_can_meet_is_accepted_and_met() {
    let engine = pair(2000.0, 20.0);
    all_ready(&engine).await;
    let answer = engine.submit(rig::due(1, 1000)).unwrap().await.unwrap();
    assert_eq!(answer.timing.device, 1);
    let soon = |ms| Some(std::time::Instant::now() + Duration::from_millis(ms));
    assert_eq!(engine.admit(soon(1000)), Ok(()));
    assert!(matches!(engine.admit(soon(5)), Err(EngineError::Deadline { .. })), "before any work");
    let refused = engine.submit(rig::due(1, 5)).unwrap_err();
    assert!(matches!(refused, EngineError::Deadline { .. }), "{refused:?}");
}

#[tokio::test]
async fn a_device_that_dies_under_load_costs_what_it_held_and_nothing_else() {
    // Warm-up and canary are three runs; the tenth batch of the second device is its last.
    let sound = NullDevice::new(NullTimes::constant(5.0));
    let dying = NullDevice::new(NullTimes::constant(5.0))
        .with_faults(|run| (run >= 12).then_some(Fault::Panic));
    let mut options = rig::options(1);
    options.canary.max_age = Duration::from_secs(600);
    let engine = Engine::start(vec![rig::factory(&sound), rig::factory(&dying)], options).unwrap();
    all_ready(&engine).await;
    let mut lost = 0;
    for round in 0..20 {
        let batch: Vec<Request> = (0..10).map(|i| request(round * 10 + i)).collect();
        let pending: Vec<_> = batch.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        for (i, pending) in pending.into_iter().enumerate() {
            match pending.await {
                Ok(answer) => {
                    let seed = (round * 10 + i) as u64;
                    assert_eq!(answer.actions, expected(&batch[i], seed));
                }
                Err(EngineError::DeviceFailed(_)) => lost += 1,
                Err(other) => panic!("{other:?}"),
            }
            assert_eq!(engine.readiness().await, Ok(()), "the other one serves on");
        }
    }
    assert_eq!(lost, 1, "batches of one: one request was on the device when it died");
    assert!(engine.stats().restarts >= 1);
}
