//! Batches, order, deadlines, noise, drain: an engine on devices that work.

mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use pirouette_engine::{
    Company, Engine, EngineError, EngineOptions, Noise, NullDevice, NullTimes, Request,
};
use pirouette_model::rtc::Settings;
use pirouette_model::{
    BackendError, Config, Device, Executable, Family, PreviousChunk, Program, Rtc, WeightTable,
};
use rig::{HORIZON, due, eventually, expected, request};

/// Keeps the device busy so that what is submitted next has to queue.
async fn occupy(engine: &Engine) -> pirouette_engine::Pending {
    let pending = engine.submit(request(99)).unwrap();
    eventually("busy", || {
        let stats = engine.stats();
        stats.devices[0].busy && stats.queue_depth == 0
    })
    .await;
    pending
}

#[tokio::test]
async fn an_answer_depends_on_its_request_and_seed_only() {
    let engine = rig::engine(&[(1, 15.0)], rig::options(8));
    engine.wait_ready().await.unwrap();
    let mut alone = Vec::new();
    for i in 0..20 {
        let answer = engine.submit(request(i)).unwrap().await.unwrap();
        assert_eq!(answer.actions, expected(&request(i), i as u64));
        assert_eq!((answer.horizon, answer.action_dim, answer.seed), (HORIZON, 4, Some(i as u64)));
        assert_eq!((answer.timing.batch, answer.timing.slots), (1, 1));
        assert!(answer.timing.run.total_ms >= 15.0 && answer.timing.total_ms >= 15.0);
        alone.push(answer.actions);
    }
    let mut sizes = std::collections::BTreeSet::new();
    for round in 0..20 {
        let _busy = occupy(&engine).await;
        let order: Vec<usize> = (0..20).map(|k| (k * 7 + round) % 20).collect();
        let pending: Vec<_> =
            order.iter().map(|i| (*i, engine.submit(request(*i)).unwrap())).collect();
        for (i, pending) in pending {
            let answer = pending.await.unwrap();
            assert_eq!(answer.actions, alone[i]);
            sizes.insert(answer.timing.batch);
        }
    }
    assert!(sizes.len() > 1 && sizes.contains(&8), "several batch sizes were met: {sizes:?}");
}

#[tokio::test]
async fn noise_is_drawn_given_or_refused() {
    let engine = rig::engine(&[(1, 0.1)], rig::options(1));
    engine.wait_ready().await.unwrap();
    let infer = |noise| engine.submit(Request { noise, ..request(1) });
    let drawn = infer(Noise::Drawn).unwrap().await.unwrap();
    assert_eq!(drawn.actions, expected(&request(1), drawn.seed.unwrap()));
    let again = infer(Noise::Seed(drawn.seed.unwrap())).unwrap().await.unwrap();
    assert_eq!(again.actions, drawn.actions);
    assert_ne!(infer(Noise::Drawn).unwrap().await.unwrap().seed, drawn.seed);

    let mut values = vec![0.0; HORIZON * 4];
    pirouette_engine::standard_normal(1, &mut values);
    let given = infer(Noise::Given(values.clone())).unwrap().await.unwrap();
    assert_eq!((given.actions, given.seed), (expected(&request(1), 1), None));
    values[3] = f32::NAN;
    assert!(matches!(infer(Noise::Given(values)), Err(EngineError::Invalid(_))));
    assert!(matches!(infer(Noise::Given(vec![0.0; 3])), Err(EngineError::Invalid(_))));
}

#[tokio::test]
async fn a_batch_forms_from_what_waits() {
    let engine = rig::engine(&[(1, 20.0), (8, 24.0)], rig::options(8));
    engine.wait_ready().await.unwrap();
    let first = occupy(&engine).await;
    let rest: Vec<_> = (0..8).map(|i| engine.submit(request(i)).unwrap()).collect();
    let started = Instant::now();
    first.await.unwrap();
    for pending in rest {
        let timing = pending.await.unwrap().timing;
        assert_eq!((timing.batch, timing.slots), (8, 8));
        assert!(timing.queue_ms > 1.0, "they waited for the device: {timing:?}");
    }
    assert!(started.elapsed() < Duration::from_millis(120), "not one by one");
    let stats = engine.stats();
    assert_eq!(stats.batches.get(&8), Some(&1));
    assert_eq!((stats.accepted, stats.completed, stats.queue_depth), (9, 9, 0));
}

#[tokio::test]
async fn a_larger_size_with_an_empty_slot_runs_where_that_is_faster() {
    let engine = rig::engine(&[(1, 200.0), (8, 210.0)], rig::options(8));
    engine.wait_ready().await.unwrap();
    let first = occupy(&engine).await;
    let rest: Vec<_> = (0..7).map(|i| engine.submit(request(i)).unwrap()).collect();
    first.await.unwrap();
    for (i, pending) in rest.into_iter().enumerate() {
        let answer = pending.await.unwrap();
        assert_eq!((answer.timing.batch, answer.timing.slots), (7, 8));
        assert_eq!(answer.actions, expected(&request(i), i as u64));
    }
}

fn tied(i: usize) -> Request {
    let left_over: Vec<f32> = (0..2 * 4).map(|v| v as f32 - i as f32).collect();
    let settings = Settings { delay: 1, ..Settings::default() };
    let previous = PreviousChunk::new(&left_over, [2, 4], &settings, [HORIZON, 4]).unwrap();
    Request { previous: Some(previous), ..request(i) }
}

#[tokio::test]
async fn requests_with_a_previous_chunk_share_batches_with_their_kind() {
    let engine = rig::engine(&[(1, 100.0), (4, 110.0)], rig::options(4));
    engine.wait_ready().await.unwrap();
    let first = occupy(&engine).await;
    let submit = |i| {
        let request = if i % 2 == 0 { request(i) } else { tied(i) };
        (i, request.clone(), engine.submit(request).unwrap())
    };
    let waiting: Vec<_> = (0..8).map(submit).collect();
    first.await.unwrap();
    for (i, request, pending) in waiting {
        let answer = pending.await.unwrap();
        assert_eq!((answer.timing.batch, answer.timing.slots), (4, 4), "request {i}");
        let mut want = expected(&request, i as u64);
        if let Some(p) = &request.previous {
            assert_eq!(p.weights[..3], [1.0, 0.5, 0.0]);
            for (at, (want, to)) in want.iter_mut().zip(&p.chunk).enumerate() {
                *want += p.weights[at / 4] * (to - *want);
            }
        }
        assert_eq!(answer.actions, want, "request {i}");
    }
    // Nothing of a previous chunk is left for the next plain request.
    assert!(engine.submit(tied(1)).unwrap().await.is_ok());
    let plain = engine.submit(request(2)).unwrap().await.unwrap();
    assert_eq!(plain.actions, expected(&request(2), 2));
}

/// A device that has no kernels for given actions.
struct NoGivenActions(NullDevice);

impl Device for NoGivenActions {
    fn name(&self) -> String {
        self.0.name()
    }

    fn compile(&mut self, program: Arc<Program>) -> Result<Box<dyn Executable>, BackendError> {
        match program.shape.rtc {
            Rtc::Trained => Err(BackendError::Unsupported("use the guided mode".into())),
            _ => self.0.compile(program),
        }
    }

    fn weight_bytes(&self) -> u64 {
        0
    }
}

#[tokio::test]
async fn given_actions_are_part_of_the_noise_or_refused_without_harm() {
    let config = Config { family: Family::Pi05, rtc_max_delay: 2, ..rig::config() };
    let tables = vec![Arc::new(WeightTable::new(config, 3))];
    let options = EngineOptions { tables, warm: vec![], ..rig::options(1) };
    let left_over: Vec<f32> = (0..2 * 4).map(|v| v as f32).collect();
    let given = PreviousChunk::given(&left_over, [2, 4], 2, 2, [HORIZON, 4]).unwrap();
    let tied = || Request { previous: Some(given.clone()), ..request(1) };

    let engine = rig::engine(&[(1, 0.0)], options.clone());
    engine.wait_ready().await.unwrap();
    let answer = engine.submit(tied()).unwrap().await.unwrap();
    // The null device halves the noise, adds a number, and draws by the weights: all the way.
    assert_eq!(answer.actions[..8], left_over);
    assert_eq!(answer.actions[8..], expected(&request(1), 1)[8..]);

    let null = NullDevice::new(NullTimes::constant(0.0));
    let factory: pirouette_engine::DeviceFactory =
        Arc::new(move || Ok(Box::new(NoGivenActions(null.clone()))));
    let engine = Engine::start(vec![factory], options).unwrap();
    engine.wait_ready().await.unwrap();
    let refused = engine.submit(tied()).unwrap().await.unwrap_err();
    assert_eq!(refused, EngineError::Invalid("use the guided mode".into()));
    assert!(engine.submit(request(1)).unwrap().await.is_ok(), "the device is as good as before");
    assert_eq!(engine.stats().devices[0].restarts, 0);
}

#[tokio::test]
async fn a_window_waits_for_company_and_says_so() {
    let mut options = rig::options(2);
    options.window = Duration::from_millis(400);
    let engine = rig::engine(&[(1, 1.0)], options);
    engine.wait_ready().await.unwrap();
    let lonely = engine.submit(request(0)).unwrap().await.unwrap().timing;
    assert_eq!(lonely.batch, 1);
    assert!(lonely.batch_wait_ms > 300.0, "{lonely:?}");
    let a = engine.submit(request(0)).unwrap();
    let b = engine.submit(request(1)).unwrap();
    let together = a.await.unwrap().timing;
    assert_eq!((together.batch, b.await.unwrap().timing.batch), (2, 2));
    assert!(together.batch_wait_ms < 300.0, "a full batch does not wait: {together:?}");
    let hurried = engine.submit(due(2, 100)).unwrap().await.unwrap().timing;
    assert!(hurried.batch_wait_ms < 300.0, "a deadline cuts the window short: {hurried:?}");
}

#[tokio::test]
async fn those_who_come_together_wait_for_each_other_but_not_for_long() {
    let engine = rig::engine(&[(1, 400.0), (4, 410.0)], rig::options(4));
    engine.wait_ready().await.unwrap();
    let with = |i, company: &Company| {
        engine.submit(Request { company: Some(company.clone()), ..request(i) }).unwrap()
    };
    let company = Company::default();
    let first = with(0, &company);
    tokio::time::sleep(Duration::from_millis(30)).await;
    let second = with(1, &company);
    // The others are given up.
    drop(company);
    let timing = first.await.unwrap().timing;
    assert_eq!((timing.batch, second.await.unwrap().timing.batch), (2, 2));
    let waited_ms = timing.batch_wait_ms;
    assert!((25.0..350.0).contains(&waited_ms), "no longer than it must: {timing:?}");

    let company = Company::default();
    let timing = with(2, &company).await.unwrap().timing;
    assert_eq!(timing.batch, 1, "nobody came");
    assert!(timing.batch_wait_ms > 300.0, "{timing:?}");
    let four: Vec<_> = (0..4).map(|i| with(i, &company)).collect();
    for pending in four {
        let timing = pending.await.unwrap().timing;
        assert!(timing.batch == 4 && timing.batch_wait_ms < 300.0, "a full one: {timing:?}");
    }
}

/// Waiting for company is nobody's loss, or it is not done.
#[tokio::test]
async fn nobody_pays_for_those_who_come_together() {
    let company = Company::default();
    let of_company = |i| Request { company: Some(company.clone()), ..request(i) };
    let engine = rig::engine(&[(1, 400.0), (4, 410.0)], rig::options(4));
    engine.wait_ready().await.unwrap();
    let late = Instant::now() + Duration::from_millis(1000);
    let hurried = engine.submit(Request { deadline: Some(late), ..of_company(0) }).unwrap();
    let timing = hurried.await.unwrap().timing;
    assert!(timing.batch_wait_ms < 200.0, "another after it would be too late: {timing:?}");
    let head = engine.submit(of_company(0)).unwrap();
    tokio::time::sleep(Duration::from_millis(30)).await;
    let stranger = engine.submit(request(1)).unwrap();
    let timing = head.await.unwrap().timing;
    assert!(timing.batch_wait_ms < 300.0, "others wait: {timing:?}");
    assert!(stranger.await.unwrap().timing.batch_wait_ms < 200.0);

    let engine = rig::engine(&[(1, 400.0), (4, 1600.0)], rig::options(4));
    engine.wait_ready().await.unwrap();
    let four: Vec<_> = (0..4).map(|i| engine.submit(request(i)).unwrap()).collect();
    for pending in four {
        pending.await.unwrap();
    }
    let timing = engine.submit(of_company(0)).unwrap().await.unwrap().timing;
    assert!(timing.batch_wait_ms < 200.0, "there is nothing to gain: {timing:?}");
}

#[tokio::test]
async fn the_earliest_deadline_is_served_first() {
    let engine = rig::engine(&[(1, 10.0)], rig::options(1));
    engine.wait_ready().await.unwrap();
    let first = occupy(&engine).await;
    let (done, mut order) = tokio::sync::mpsc::unbounded_channel();
    for (i, ms) in [(0, 900), (1, 300), (2, 600)] {
        let (pending, done) = (engine.submit(due(i, ms)).unwrap(), done.clone());
        tokio::spawn(async move {
            pending.await.unwrap();
            done.send(i).unwrap();
        });
    }
    first.await.unwrap();
    let mut got = Vec::new();
    for _ in 0..3 {
        got.push(order.recv().await.unwrap());
    }
    assert_eq!(got, [1, 2, 0]);
}

#[tokio::test]
async fn what_cannot_make_its_deadline_is_refused_at_once() {
    let engine = rig::engine(&[(1, 30.0)], rig::options(1));
    engine.wait_ready().await.unwrap();
    for _ in 0..3 {
        engine.submit(due(0, 500)).unwrap().await.unwrap();
    }
    let _running = occupy(&engine).await;
    let _waiting: Vec<_> = (0..3).map(|i| engine.submit(due(i, 1000)).unwrap()).collect();
    let started = Instant::now();
    let refused = engine.submit(due(9, 1100).with_ms(60)).unwrap_err();
    assert!(started.elapsed() < Duration::from_millis(5));
    assert!(
        matches!(refused, EngineError::Deadline { deadline_ms, predicted_ms }
            if deadline_ms <= 60.0 && predicted_ms > 30.0),
        "earlier than all that wait, but behind the one that runs: {refused:?}"
    );
    let late = engine.submit(due(9, 1100).with_ms(1)).unwrap_err();
    assert!(late.to_string().contains("1.0 ms away"), "{late}");
    assert_eq!(engine.stats().errors_for("deadline"), 2);
}

trait WithMs {
    fn with_ms(self, ms: u64) -> Self;
}

impl WithMs for Request {
    fn with_ms(mut self, ms: u64) -> Self {
        self.deadline = Some(Instant::now() + Duration::from_millis(ms));
        self
    }
}

#[tokio::test]
async fn requests_nobody_waits_for_are_not_run() {
    let engine = rig::engine(&[(1, 20.0)], rig::options(1));
    engine.wait_ready().await.unwrap();
    let first = occupy(&engine).await;
    let waiting: Vec<_> = (0..10).map(|i| engine.submit(request(i)).unwrap()).collect();
    drop(waiting);
    let last = engine.submit(request(7)).unwrap();
    first.await.unwrap();
    let timing = last.await.unwrap().timing;
    assert!(timing.total_ms < 100.0, "ten runs would take 200 ms: {timing:?}");
    assert_eq!(engine.stats().cancelled, 10);
}

#[tokio::test]
async fn a_full_queue_refuses() {
    let mut options = rig::options(1);
    options.queue_capacity = 4;
    let engine = rig::engine(&[(1, 200.0)], options);
    engine.wait_ready().await.unwrap();
    let _running = occupy(&engine).await;
    let mut waiting: Vec<_> = (0..4).map(|i| engine.submit(request(i)).unwrap()).collect();
    let full = Err(EngineError::Overloaded { capacity: 4 });
    assert_eq!(engine.submit(request(4)).map(drop), full);
    assert_eq!(engine.admit(None), full, "before anything is prepared for it");
    waiting.pop();
    assert_eq!(engine.admit(None), Ok(()), "one was withdrawn");
}

#[tokio::test]
async fn twice_the_load_keeps_the_capacity() {
    // Batches of 4 in 100 ms: 40 requests per second; 80 arrive, each with 600 ms to live. Slow,
    // so that a machine with other things to do does not fail it.
    let engine = rig::engine(&[(1, 90.0), (4, 100.0)], rig::options(4));
    engine.wait_ready().await.unwrap();
    let engine = std::sync::Arc::new(engine);
    let started = Instant::now();
    let mut tasks = Vec::new();
    let mut slowest_refusal = Duration::ZERO;
    for i in 0..240u32 {
        tokio::time::sleep_until((started + Duration::from_micros(12_500) * i).into()).await;
        let asked = Instant::now();
        match engine.submit(due(i as usize, 600)) {
            Ok(pending) => tasks.push(tokio::spawn(async move {
                pending.await.is_ok() && asked.elapsed() < Duration::from_millis(600)
            })),
            Err(_) => slowest_refusal = slowest_refusal.max(asked.elapsed()),
        }
    }
    let (mut good, mut admitted) = (0, 0);
    for task in tasks {
        admitted += 1;
        good += task.await.unwrap() as usize;
    }
    let per_second = good as f64 / started.elapsed().as_secs_f64();
    println!("{per_second:.0}/s good of 40/s possible; {admitted} of 240 admitted");
    assert!(per_second > 34.0, "{per_second:.0} good answers per second of 40 possible");
    assert!(admitted < 168, "the rest was refused on arrival, {admitted} were let in");
    assert!(slowest_refusal < Duration::from_millis(20), "{slowest_refusal:?}");
}

#[tokio::test]
async fn wrong_requests_are_named() {
    let engine = rig::engine(&[(1, 0.0)], rig::options(1));
    engine.wait_ready().await.unwrap();
    let good = || request(1);
    let spoilt = |change: fn(&mut PreviousChunk)| {
        let mut request = tied(1);
        change(request.previous.as_mut().unwrap());
        request
    };
    let cases: [(&str, Request); 12] = [
        ("0 cameras", Request { images: vec![], ..good() }),
        ("4 cameras", Request { images: vec![good().images[0].clone(); 4], ..good() }),
        ("an image has 3 bytes", Request { images: vec![vec![0; 3].into()], ..good() }),
        ("0 tokens", Request { tokens: vec![], ..good() }),
        ("49 tokens", Request { tokens: vec![1; 49], ..good() }),
        ("token 100", Request { tokens: vec![100], ..good() }),
        ("the state has 3", Request { state: vec![0.0; 3], ..good() }),
        ("value 2 of the state", Request { state: vec![0.0, 0.0, f32::INFINITY, 0.0], ..good() }),
        ("num_steps 7", Request { steps: Some(7), ..good() }),
        ("the model takes at most [5, 4]", spoilt(|p| p.weights.truncate(4))),
        ("value 3 of the previous chunk", spoilt(|p| p.chunk[3] = f32::NAN)),
        ("guidance limit", spoilt(|p| p.limit = -1.0)),
    ];
    for (text, request) in cases {
        let error = engine.submit(request).unwrap_err();
        assert!(matches!(&error, EngineError::Invalid(e) if e.contains(text)), "{text}: {error}");
    }
    assert_eq!(engine.stats().errors_for("invalid"), 12);
    assert!(engine.submit(good()).unwrap().await.is_ok());
}

#[tokio::test]
async fn draining_finishes_what_was_accepted_and_refuses_the_rest() {
    let engine = rig::engine(&[(1, 10.0)], rig::options(1));
    engine.wait_ready().await.unwrap();
    let pending: Vec<_> = (0..5).map(|i| engine.submit(request(i)).unwrap()).collect();
    let engine = std::sync::Arc::new(engine);
    let draining = engine.clone();
    let drained = tokio::task::spawn_blocking(move || draining.drain(Duration::from_secs(5)));
    eventually("draining", || matches!(engine.submit(request(9)), Err(EngineError::Draining)))
        .await;
    assert!(engine.readiness().await.is_err());
    for pending in pending {
        assert!(pending.await.is_ok());
    }
    assert!(drained.await.unwrap());
}

#[tokio::test]
async fn an_impatient_drain_answers_what_is_left() {
    let engine = rig::engine(&[(1, 50.0)], rig::options(1));
    engine.wait_ready().await.unwrap();
    let pending: Vec<_> = (0..5).map(|i| engine.submit(request(i)).unwrap()).collect();
    let finished = tokio::task::spawn_blocking(move || {
        let finished = engine.drain(Duration::from_millis(20));
        drop(engine);
        finished
    });
    assert!(!finished.await.unwrap());
    let mut refused = 0;
    for pending in pending {
        refused += (pending.await == Err(EngineError::Draining)) as usize;
    }
    assert!((3..=4).contains(&refused), "{refused}");
}

#[tokio::test]
async fn an_announced_request_is_looked_out_for_and_one_that_never_comes_holds_up_nothing() {
    // Far longer than any of this takes: whoever missed the request, or the end, would be late.
    const PATIENCE: Duration = Duration::from_secs(20);
    let lookout = PATIENCE * 3;
    let engine = rig::engine(&[(1, 0.0)], EngineOptions { lookout, ..rig::options(1) });
    engine.wait_ready().await.unwrap();
    for i in 0..20 {
        engine.expect();
        if i % 2 == 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let asked = engine.submit(request(i)).unwrap();
        let answer = tokio::time::timeout(PATIENCE, asked).await.unwrap().unwrap();
        assert_eq!(answer.actions, expected(&request(i), i as u64));
    }
    engine.expect();
    tokio::time::sleep(Duration::from_millis(2)).await;
    let ended = tokio::task::spawn_blocking(move || drop(engine));
    tokio::time::timeout(PATIENCE, ended).await.expect("it ends").unwrap();
}

#[tokio::test]
async fn batches_are_remembered_with_their_times() {
    let engine = rig::engine(&[(1, 5.0), (8, 6.0)], rig::options(8));
    engine.wait_ready().await.unwrap();
    assert_eq!(engine.batches_after(0), (vec![], 0), "warm-up and canary are no batches");
    let pending: Vec<_> = (0..20).map(|i| engine.submit(request(i)).unwrap()).collect();
    let mut members = std::collections::BTreeMap::<u64, usize>::new();
    for pending in pending {
        let timing = pending.await.unwrap().timing;
        *members.entry(timing.batch_id).or_default() += 1;
    }
    let (batches, forgotten) = engine.batches_after(0);
    assert_eq!((batches.len(), forgotten), (members.len(), 0));
    for (batch, (id, requests)) in batches.iter().zip(members) {
        assert_eq!((batch.id, batch.requests, batch.device), (id, requests, 0));
        assert!(batch.requests <= batch.slots && batch.bucket.horizon == HORIZON);
        assert!(batch.taken <= batch.started && batch.started < batch.done);
    }
    assert!(batches.windows(2).all(|w| w[0].done <= w[1].taken), "one at a time");
    assert!(engine.stats().devices[0].fingerprint.is_some());
}

/// A busy device thread looks out for requests by itself; it must still hear of all the rest.
#[tokio::test]
async fn a_device_that_stays_awake_hears_of_everything() {
    let mut options = rig::options(2);
    options.busy_poll = Duration::from_secs(3600);
    options.canary.max_age = Duration::ZERO;
    let engine = rig::engine(&[(1, 1.0)], options);
    engine.wait_ready().await.unwrap();
    for i in 0..5 {
        let answer = engine.submit(request(i)).unwrap().await.unwrap();
        assert_eq!(answer.actions, expected(&request(i), i as u64));
    }
    let canaries = engine.stats().canaries;
    engine.readiness().await.unwrap();
    assert_eq!(engine.stats().canaries, canaries + 1);
    assert!(engine.drain(Duration::from_secs(10)), "nothing is left");
    assert!(matches!(engine.submit(request(0)), Err(EngineError::Draining)));
    drop(engine);
}
