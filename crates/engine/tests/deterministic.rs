//! The same bits alone and in any slot of any batch, on a device whose answers depend on the
//! program's shape, as real kernels' do.

mod rig;

use std::collections::BTreeSet;

use pirouette_engine::{BucketRule, Engine, EngineOptions, NullDevice, NullTimes, Request};
use rig::request;

/// Requests of all lengths and one or two cameras.
fn varied(i: usize) -> Request {
    let mut request = request(i);
    request.tokens = (0..1 + i * 7 % 48).map(|t| (t % 100) as u32).collect();
    if i.is_multiple_of(3) {
        request.images.push(request.images[0].clone());
    }
    request
}

async fn engine(rule: BucketRule) -> Engine {
    let device = NullDevice::new(NullTimes(vec![(1, 0.05), (8, 0.1)])).sensitive_to_shape();
    let options = EngineOptions { rule, ..rig::options(1) };
    let warm = vec![options.bucket(2, 48)];
    let engine =
        Engine::start(vec![rig::factory(&device)], EngineOptions { warm, ..options }).unwrap();
    engine.wait_ready().await.unwrap();
    engine
}

/// Interleavings in which some answer differs from the one the request got alone, and the batch
/// sizes that were met.
async fn differing(engine: &Engine, rounds: usize) -> (usize, BTreeSet<usize>) {
    let mut alone = Vec::new();
    for i in 0..20 {
        alone.push(engine.submit(varied(i)).unwrap().await.unwrap().actions);
    }
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut below = move |n: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (random >> 33) as usize % n
    };
    let (mut different, mut sizes) = (0, BTreeSet::new());
    for _ in 0..rounds {
        let order: Vec<usize> = (0..1 + below(16)).map(|_| below(20)).collect();
        let pending: Vec<_> = order.iter().map(|i| engine.submit(varied(*i)).unwrap()).collect();
        let mut same = true;
        for (i, pending) in order.iter().zip(pending) {
            let answer = pending.await.unwrap();
            same &= answer.actions == alone[*i];
            sizes.insert(answer.timing.batch);
        }
        different += usize::from(!same);
    }
    (different, sizes)
}

#[tokio::test]
async fn one_program_for_everybody_gives_the_same_bits_in_any_company() {
    let fixed = engine(BucketRule::deterministic(8, 2, 48)).await;
    let (different, sizes) = differing(&fixed, 500).await;
    assert_eq!(different, 0);
    assert!(sizes.len() > 4, "many batch sizes were met: {sizes:?}");
    let ordinary = engine(BucketRule::gpu(8)).await;
    let (different, _) = differing(&ordinary, 500).await;
    assert!(different > 100, "or this test could not fail: {different} of 500");
}
