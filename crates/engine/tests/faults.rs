//! Devices that panic, fail, hang, lie: who learns of it, and how it goes on.

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use pirouette_engine::{Engine, EngineError, EngineOptions, Fault, NullDevice, NullTimes, Phase};
use pirouette_model::{BackendError, Device, Executable, Program};
use rig::{due, eventually, expected, request};

/// Runs before the first request of a small engine: warm-up (two per batch size) and canary.
const BEFORE: u64 = 3;

fn ready(engine: &Engine) -> bool {
    engine.stats().devices[0].phase == Phase::Ready
}

async fn fails_then_recovers(fault: Fault, says: &str) {
    let engine =
        rig::faulty(30.0, rig::options(1), move |run| (run == BEFORE + 1).then(|| fault.clone()));
    engine.wait_ready().await.unwrap();
    engine.submit(request(0)).unwrap().await.unwrap();
    let hit = engine.submit(request(1)).unwrap();
    let waiting = engine.submit(request(2)).unwrap();
    let error = hit.await.unwrap_err();
    assert!(matches!(&error, EngineError::DeviceFailed(e) if e.contains(says)), "{error:?}");
    assert!(matches!(waiting.await, Err(EngineError::Unavailable(_))), "fail fast");
    assert!(!ready(&engine), "not ready at once");
    let refused = engine.submit(request(3)).unwrap_err();
    assert!(matches!(refused, EngineError::Unavailable(_)), "{refused:?}");
    assert!(engine.readiness().await.is_err());
    eventually("ready again", || ready(&engine)).await;
    let answer = engine.submit(request(4)).unwrap().await.unwrap();
    assert_eq!(answer.actions, expected(&request(4), 4));
    let stats = engine.stats();
    assert_eq!((stats.restarts, stats.devices[0].restarts), (1, 1));
    assert_eq!((stats.errors_for("device_failed"), stats.errors_for("unavailable")), (1, 2));
}

#[tokio::test]
async fn a_panic_stays_on_its_device() {
    fails_then_recovers(Fault::Panic, "panic: the null device was told to").await;
}

#[tokio::test]
async fn a_device_error_reopens_the_device() {
    fails_then_recovers(Fault::Error("illegal address".into()), "illegal address").await;
}

#[tokio::test]
async fn a_hung_device_is_given_up_and_replaced() {
    let mut options = rig::options(1);
    options.watchdog = Duration::from_millis(100);
    let engine = rig::faulty(2.0, options, |run| {
        (run == BEFORE).then_some(Fault::Hang(Duration::from_millis(600)))
    });
    engine.wait_ready().await.unwrap();
    let started = Instant::now();
    let error = engine.submit(request(0)).unwrap().await.unwrap_err();
    assert!(started.elapsed() < Duration::from_millis(400), "{:?}", started.elapsed());
    assert!(matches!(&error, EngineError::DeviceFailed(e) if e.contains("no answer")), "{error}");
    eventually("ready again", || ready(&engine)).await;
    assert!(started.elapsed() < Duration::from_millis(550), "while the old thread still hangs");
    assert!(engine.submit(request(1)).unwrap().await.is_ok());
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert!(ready(&engine), "the old thread's return changes nothing");
    assert!(engine.submit(request(2)).unwrap().await.is_ok());
}

#[tokio::test]
async fn a_device_that_always_hangs_is_not_replaced_for_ever() {
    let mut options = rig::options(1);
    options.watchdog_first = Duration::from_millis(40);
    options.watchdog = Duration::from_millis(40);
    let engine = rig::faulty(0.0, options, |_| Some(Fault::Hang(Duration::from_millis(1500))));
    eventually("given up for good", || {
        let phase = engine.stats().devices[0].phase.clone();
        matches!(phase, Phase::Failed(reason) if reason.contains("restart the process"))
    })
    .await;
    assert_eq!(engine.stats().restarts, 3);
    assert!(engine.wait_ready().await.unwrap_err().contains("hung 3 times"));
    assert!(engine.beyond_help().unwrap().contains("hung 3 times"));
}

#[tokio::test]
async fn a_device_left_alone_is_opened_again_when_a_thread_of_its_comes_back() {
    let mut options = rig::options(1);
    options.watchdog_first = Duration::from_millis(40);
    options.watchdog = Duration::from_millis(40);
    let runs = Arc::new(AtomicUsize::new(0));
    let engine = rig::faulty(0.0, options, move |_| {
        // Every first run of a thread hangs, three times.
        let hangs = runs.fetch_add(1, SeqCst) < 3;
        hangs.then_some(Fault::Hang(Duration::from_millis(700)))
    });
    eventually("left alone", || engine.beyond_help().is_some()).await;
    eventually("ready after all", || ready(&engine)).await;
    assert_eq!((engine.beyond_help(), engine.stats().restarts), (None, 3));
    assert!(engine.submit(request(1)).unwrap().await.is_ok());
}

#[tokio::test]
async fn a_canary_that_hangs_is_noticed_as_a_request_is() {
    let mut options = rig::options(1);
    options.watchdog = Duration::from_millis(100);
    options.canary.max_age = Duration::ZERO;
    let engine = rig::faulty(2.0, options, |run| {
        (run == BEFORE).then_some(Fault::Hang(Duration::from_millis(3000)))
    });
    engine.wait_ready().await.unwrap();
    let started = Instant::now();
    let error = engine.readiness().await.unwrap_err();
    assert!(error.contains("no answer"), "{error}");
    assert!(started.elapsed() < Duration::from_millis(600), "{:?}", started.elapsed());
    eventually("ready again", || ready(&engine)).await;
    assert!(engine.submit(request(1)).unwrap().await.is_ok());
}

#[tokio::test]
async fn a_deadline_that_passes_behind_a_slow_run_is_answered_before_that_ends() {
    let mut options = rig::options(1);
    options.watchdog = Duration::from_millis(2000);
    let engine = rig::faulty(2.0, options, |run| {
        (run == BEFORE).then_some(Fault::Hang(Duration::from_millis(1500)))
    });
    engine.wait_ready().await.unwrap();
    let slow = engine.submit(request(0)).unwrap();
    eventually("busy", || engine.stats().devices[0].busy && engine.stats().queue_depth == 0).await;
    let started = Instant::now();
    let error = engine.submit(due(1, 100)).unwrap().await.unwrap_err();
    assert!(error.to_string().contains("the deadline passed"), "{error}");
    assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
    assert!(slow.await.is_ok());
}

#[tokio::test]
async fn one_slow_run_does_not_shut_out_requests_with_deadlines() {
    let engine = rig::faulty(100.0, rig::options(1), |run| {
        (run == BEFORE).then_some(Fault::Hang(Duration::from_millis(1500)))
    });
    engine.wait_ready().await.unwrap();
    engine.submit(request(0)).unwrap().await.unwrap();
    // By mean and deviation it would take 230 ms now; the runs before took 100.
    for i in 0..4 {
        engine.submit(due(i, 190)).unwrap().await.unwrap();
    }
    // What never went well is refused as before.
    assert!(matches!(engine.submit(due(1, 50)), Err(EngineError::Deadline { .. })));
}

#[tokio::test]
async fn an_engine_is_dropped_without_a_thread_that_hangs() {
    let mut options = rig::options(1);
    options.watchdog = Duration::from_millis(200);
    options.watchdog_first = Duration::from_secs(60);
    let engine = rig::faulty(0.0, options, |_| Some(Fault::Hang(Duration::from_secs(4))));
    eventually("hanging", || engine.stats().devices[0].busy).await;
    let started = Instant::now();
    drop(engine);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_non_finite_answer_never_leaves_and_hurts_nobody_else() {
    let batch_runs = 2 * 3 + 1; // three batch sizes twice, the canary
    let engine = rig::faulty(20.0, rig::options(4), move |run| {
        (run == batch_runs + 1).then_some(Fault::Nan(2))
    });
    engine.wait_ready().await.unwrap();
    let first = engine.submit(request(9)).unwrap();
    eventually("busy", || engine.stats().devices[0].busy && engine.stats().queue_depth == 0).await;
    let batch: Vec<_> = (0..4).map(|i| engine.submit(request(i)).unwrap()).collect();
    first.await.unwrap();
    for (i, pending) in batch.into_iter().enumerate() {
        match pending.await {
            Ok(answer) => {
                assert_eq!(answer.actions, expected(&request(i), i as u64));
                assert_ne!(i, 2);
            }
            Err(error) => {
                assert_eq!((i, error), (2, EngineError::NonFinite { count: 1, total: 20 }));
            }
        }
    }
    assert!(ready(&engine));
    assert_eq!(engine.stats().errors_for("non_finite"), 1);
}

#[tokio::test]
async fn the_canary_finds_a_changed_bit_and_a_reopened_device_is_checked_against_the_same() {
    let mut options = rig::options(1);
    options.canary.max_age = Duration::ZERO;
    // The probe after the first, and the first forward after the device was reopened, are wrong.
    let engine = rig::faulty(1.0, options, |run| {
        [BEFORE + 1, BEFORE + 1 + BEFORE].contains(&run).then_some(Fault::Flip)
    });
    engine.wait_ready().await.unwrap();
    engine.readiness().await.unwrap();
    let error = engine.readiness().await.unwrap_err();
    assert!(error.contains("canary: value 0"), "{error}");
    eventually("reopened twice, ready", || engine.stats().restarts == 2 && ready(&engine)).await;
    engine.readiness().await.unwrap();
    assert!(engine.submit(request(1)).unwrap().await.is_ok());
}

/// On a CPU a run takes longer than a probe has.
#[tokio::test]
async fn a_probe_does_not_wait_for_a_run_that_began_when_the_canary_was_young() {
    let mut options = rig::options(1);
    options.canary.max_age = Duration::from_millis(100);
    let engine = rig::engine(&[(1, 400.0)], options);
    engine.wait_ready().await.unwrap();
    let canaries = engine.stats().canaries;
    let pending = engine.submit(request(1)).unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let asked = Instant::now();
    engine.readiness().await.unwrap();
    assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
    pending.await.unwrap();
    // The canary takes as long as a run, and comes now.
    for _ in 0..5 {
        let asked = Instant::now();
        engine.readiness().await.unwrap();
        assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    eventually("the canary ran", || engine.stats().canaries == canaries + 1).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let asked = Instant::now();
    engine.readiness().await.unwrap();
    assert!(asked.elapsed() > Duration::from_millis(200), "an idle device is asked");
}

#[tokio::test]
async fn a_fresh_canary_is_not_repeated() {
    let engine = rig::engine(&[(1, 0.1)], rig::options(1));
    engine.wait_ready().await.unwrap();
    for _ in 0..10 {
        engine.readiness().await.unwrap();
    }
    assert_eq!(engine.stats().canaries, 1);
}

#[tokio::test]
async fn a_device_with_another_answer_than_expected_never_gets_ready() {
    let mut options = rig::options(1);
    options.canary.expected = Some(vec![1.0; 20]);
    let engine = rig::engine(&[(1, 0.1)], options);
    let error = engine.wait_ready().await.unwrap_err();
    assert!(error.contains("known to be 1"), "{error}");
}

#[tokio::test]
async fn a_factory_that_fails_is_tried_again() {
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = tries.clone();
    let device = NullDevice::new(NullTimes::constant(0.1));
    let open = move || match counted.fetch_add(1, SeqCst) {
        0 => Err(BackendError::Unavailable("no such device".into())),
        1 => panic!("driver gone"),
        _ => Ok(Box::new(device.clone()) as Box<dyn Device>),
    };
    let engine = Engine::start(vec![Arc::new(open)], rig::options(1)).unwrap();
    assert_eq!(engine.wait_ready().await.unwrap_err(), "no such device");
    eventually("ready", || ready(&engine)).await;
    assert_eq!(tries.load(SeqCst), 3);
    assert!(engine.submit(request(0)).unwrap().await.is_ok());
}

/// Is lost when told to, which shows at a look; hangs when it is closed after that.
struct Losable {
    inner: NullDevice,
    lost: Arc<AtomicBool>,
    closing: Duration,
}

impl Device for Losable {
    fn name(&self) -> String {
        "losable".into()
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        self.inner.compile(program)
    }

    fn weight_bytes(&self) -> u64 {
        0
    }

    fn look(&mut self) -> Result<(), BackendError> {
        match self.lost.load(SeqCst) {
            true => Err(BackendError::Device("it is gone".into())),
            false => Ok(()),
        }
    }
}

impl Drop for Losable {
    fn drop(&mut self) {
        if self.lost.swap(false, SeqCst) {
            std::thread::sleep(self.closing);
        }
    }
}

/// The engine, a switch that loses its device, and how often one was opened; the first opening
/// takes as long as said.
fn losable(
    options: EngineOptions,
    [opening, closing]: [Duration; 2],
) -> (Engine, Arc<AtomicBool>, Arc<AtomicUsize>) {
    let (lost, opened) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (told, counter) = (lost.clone(), opened.clone());
    let open = move || {
        if counter.fetch_add(1, SeqCst) == 0 {
            std::thread::sleep(opening);
        }
        let inner = NullDevice::new(NullTimes::constant(0.1));
        Ok(Box::new(Losable { inner, lost: told.clone(), closing }) as Box<dyn Device>)
    };
    (Engine::start(vec![Arc::new(open)], options).unwrap(), lost, opened)
}

#[tokio::test]
async fn a_device_that_is_lost_while_nobody_asks_is_opened_anew() {
    let (engine, lost, opened) = losable(rig::options(1), [Duration::ZERO; 2]);
    engine.wait_ready().await.unwrap();
    lost.store(true, SeqCst);
    eventually("noticed", || engine.stats().restarts == 1).await;
    eventually("ready again", || ready(&engine)).await;
    assert_eq!(opened.load(SeqCst), 2);
    assert!(engine.submit(request(0)).unwrap().await.is_ok());
}

#[tokio::test]
async fn a_device_that_hangs_while_it_is_closed_is_given_up() {
    let mut options = rig::options(1);
    options.watchdog = Duration::from_millis(20);
    let (engine, lost, opened) = losable(options, [Duration::ZERO, Duration::from_secs(5)]);
    engine.wait_ready().await.unwrap();
    lost.store(true, SeqCst);
    let told = Instant::now();
    eventually("opened anew", || opened.load(SeqCst) == 2 && ready(&engine)).await;
    assert!(told.elapsed() < Duration::from_secs(4), "while it still hangs: {:?}", told.elapsed());
    assert!(engine.submit(request(0)).unwrap().await.is_ok());
}

#[tokio::test]
async fn a_device_that_hangs_while_it_is_opened_is_given_up() {
    let mut options = rig::options(1);
    options.watchdog_open = Duration::from_millis(50);
    let (engine, _, opened) = losable(options, [Duration::from_secs(5), Duration::ZERO]);
    let started = Instant::now();
    eventually("opened anew", || opened.load(SeqCst) == 2 && ready(&engine)).await;
    assert!(started.elapsed() < Duration::from_secs(4), "while it still hangs");
    assert!(engine.submit(request(0)).unwrap().await.is_ok());
}

/// A device whose weights were replaced: nothing is tried again, and `beyond_help` says so. A swap
/// compares with what it answered while it was ready.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_whose_weights_were_replaced_is_left_alone_until_a_swap() {
    let (lost, opened) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let open = |stale: bool, opened: &Arc<AtomicUsize>| -> pirouette_engine::DeviceFactory {
        let (lost, opened) = (lost.clone(), opened.clone());
        Arc::new(move || {
            if opened.fetch_add(1, SeqCst) > 0 && stale {
                return Err(BackendError::Stale("other weights: POST /swap".into()));
            }
            let inner = NullDevice::new(NullTimes::constant(0.1));
            Ok(Box::new(Losable { inner, lost: lost.clone(), closing: Duration::ZERO }))
        })
    };
    let engine = Engine::start(vec![open(true, &opened)], rig::options(1)).unwrap();
    engine.wait_ready().await.unwrap();
    lost.store(true, SeqCst);
    eventually("left alone", || engine.beyond_help().is_some()).await;
    // Ten times the pause before it would be opened again.
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(opened.load(SeqCst), 2);
    assert_eq!(engine.beyond_help().as_deref(), Some("other weights: POST /swap"));
    let phase = engine.stats().devices[0].phase.clone();
    assert_eq!(phase, Phase::Failed("other weights: POST /swap".into()));
    let refused = engine.submit(request(0)).unwrap_err();
    assert!(matches!(&refused, EngineError::Unavailable(why) if why.contains("POST /swap")));

    let again = open(false, &Arc::default());
    let (new, report) = tokio::task::block_in_place(|| {
        engine.successor(vec![again], rig::options(1), Duration::from_secs(20)).unwrap()
    });
    assert_eq!((report.devices, report.changed), (1, false), "the same answer to the canary");
    assert!(new.beyond_help().is_none());
    assert!(new.submit(request(0)).unwrap().await.is_ok());
}

/// One device that serves on is enough.
#[tokio::test]
async fn one_stale_device_among_others_is_no_end() {
    let stale = || Err(BackendError::Stale("other weights".into()));
    let good = rig::factory(&NullDevice::new(NullTimes::constant(0.1)));
    let engine = Engine::start(vec![Arc::new(stale), good], rig::options(1)).unwrap();
    engine.wait_ready().await.unwrap();
    let failed = |phase: &Phase| matches!(phase, Phase::Failed(why) if why == "other weights");
    eventually("stale", || failed(&engine.stats().devices[0].phase)).await;
    assert_eq!(engine.beyond_help(), None);
    assert!(engine.submit(request(0)).unwrap().await.is_ok());
}

#[tokio::test]
async fn draining_does_not_wait_for_a_device_that_is_opened() {
    let (engine, _, opened) = losable(rig::options(1), [Duration::from_secs(2), Duration::ZERO]);
    eventually("opening", || opened.load(SeqCst) == 1 && engine.stats().devices[0].busy).await;
    let started = Instant::now();
    assert!(engine.drain(Duration::from_secs(60)), "nobody waits for an answer");
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
}

/// Counts what is compiled and runs out of memory above a batch size.
struct Counting {
    inner: NullDevice,
    compiled: Arc<AtomicUsize>,
    largest: usize,
}

impl Device for Counting {
    fn name(&self) -> String {
        "counting".into()
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        if program.shape.batch > self.largest {
            return Err(BackendError::OutOfMemory {
                what: "the arena".into(),
                device: self.name(),
                needed_bytes: 2,
                free_bytes: 1,
            });
        }
        self.compiled.fetch_add(1, SeqCst);
        self.inner.compile(program)
    }

    fn weight_bytes(&self) -> u64 {
        7
    }
}

fn counting(largest: usize, options: EngineOptions) -> (Engine, Arc<AtomicUsize>) {
    let compiled = Arc::new(AtomicUsize::new(0));
    let counter = compiled.clone();
    let open = move || {
        let inner = NullDevice::new(NullTimes::constant(5.0));
        let device = Counting { inner, compiled: counter.clone(), largest };
        Ok(Box::new(device) as Box<dyn Device>)
    };
    (Engine::start(vec![Arc::new(open)], options).unwrap(), compiled)
}

#[tokio::test]
async fn programs_are_kept_up_to_the_limit_least_recently_used_first() {
    let mut options = rig::options(1);
    options.executables = 2;
    let (engine, compiled) = counting(64, options);
    engine.wait_ready().await.unwrap();
    assert_eq!(compiled.load(SeqCst), 1, "warm-up and canary share a bucket");
    let infer = async |tokens: usize| {
        let request = pirouette_engine::Request { tokens: vec![1; tokens], ..request(1) };
        engine.submit(request).unwrap().await.unwrap();
        compiled.load(SeqCst)
    };
    let mut seen = Vec::new();
    for tokens in [16, 17, 5, 40, 3, 17] {
        seen.push(infer(tokens).await); // buckets 16, 32, 16, 48, 16, 32
    }
    assert_eq!(seen, [1, 2, 2, 3, 3, 4]);
    assert_eq!(engine.stats().devices[0].weight_bytes, 7);
}

#[tokio::test]
async fn out_of_memory_means_smaller_batches() {
    let (engine, _) = counting(2, rig::options(8));
    engine.wait_ready().await.unwrap();
    let pending: Vec<_> = (0..20).map(|i| engine.submit(request(i)).unwrap()).collect();
    for pending in pending {
        assert!(pending.await.unwrap().timing.slots <= 2);
    }
    assert_eq!(engine.stats().restarts, 0);
}

#[tokio::test]
async fn killed_under_load_a_hundred_times_nothing_hangs() {
    let mut options = rig::options(4);
    options.restart_pause = Duration::from_millis(1);
    options.restart_pause_max = Duration::from_millis(1);
    options.warm.clear();
    let engine = rig::faulty(0.2, options, |run| match run % 10 {
        9 if run % 20 == 9 => Some(Fault::Panic),
        9 => Some(Fault::Error("gone".into())),
        _ => None,
    });
    let engine = Arc::new(engine);
    let started = Instant::now();
    let mut clients = Vec::new();
    for client in 0..8 {
        let engine = engine.clone();
        clients.push(tokio::spawn(async move {
            let mut good = 0;
            while engine.stats().restarts < 100 {
                assert!(started.elapsed() < Duration::from_secs(20), "too slow");
                match engine.submit(request(client)) {
                    Ok(pending) => match pending.await {
                        Ok(answer) => {
                            assert_eq!(answer.actions, expected(&request(client), client as u64));
                            good += 1;
                        }
                        Err(EngineError::DeviceFailed(_) | EngineError::Unavailable(_)) => {}
                        Err(other) => panic!("{other:?}"),
                    },
                    Err(EngineError::Unavailable(_)) => {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    Err(other) => panic!("{other:?}"),
                }
            }
            good
        }));
    }
    for client in clients {
        assert!(client.await.unwrap() > 10);
    }
}
