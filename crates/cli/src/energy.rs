//! A GPU's energy counter, which moves some ten times a second → the power of a load.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// How often the counter is looked at.
const LOOK: Duration = Duration::from_millis(5);

/// How long a load is watched at least.
const LONG: Duration = Duration::from_millis(2200);

/// What a load took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Power {
    pub watts: f64,
    pub seconds_per_sample: f64,
}

/// Works, piece by piece, for two seconds, and looks at the counter (joules); `work` tells
/// how many samples a piece was. `None` without a counter that moves.
///
/// # Errors
/// Of the work.
pub fn of(
    counter: impl Fn() -> Option<f64> + Sync,
    mut work: impl FnMut() -> Result<usize>,
) -> Result<Option<Power>> {
    let (done, begun) = (AtomicBool::new(false), Instant::now());
    let look = || {
        let mut seen = Vec::new();
        while !done.load(Relaxed) {
            seen.extend(counter().map(|joules| (begun.elapsed().as_secs_f64(), joules)));
            thread::sleep(LOOK);
        }
        seen
    };
    let (mut samples, mut seconds) = (0, 0.0);
    let (seen, worked) = thread::scope(|scope| {
        let looking = scope.spawn(look);
        let mut worked = Ok(());
        while worked.is_ok() && begun.elapsed() < LONG {
            worked = work().map(|more| samples += more);
            seconds = begun.elapsed().as_secs_f64();
        }
        done.store(true, Relaxed);
        (looking.join().unwrap_or_default(), worked)
    });
    worked?;
    Ok(watts(&seen).map(|watts| Power { watts, seconds_per_sample: seconds / samples as f64 }))
}

/// Between the first and the last time that the counter moved: at the ends of any other stretch it
/// may just have moved, or be about to.
fn watts(seen: &[(f64, f64)]) -> Option<f64> {
    let mut moved = seen.windows(2).filter(|pair| pair[0].1 != pair[1].1).map(|pair| pair[1]);
    let (first, last) = (moved.next()?, moved.next_back()?);
    Some((last.1 - first.1) / (last.0 - first.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_of_steps_gives_the_same_power_at_any_phase() {
        for phase in 0..20 {
            let at = |i: i32| f64::from(i) * 0.005;
            let counter = |s: f64| 7e4 + 70.0 * ((s + f64::from(phase) * 0.005) / 0.1).floor();
            let seen: Vec<_> = (0..440).map(|i| (at(i), counter(at(i)))).collect();
            let watts = watts(&seen).unwrap();
            assert!((watts - 700.0).abs() < 7.0, "{watts} at {phase}");
            let ends = (seen[200].1 - seen[0].1) / (seen[200].0 - seen[0].0);
            assert!(
                (ends - 700.0).abs() < 71.0,
                "what a second between two readings gives: {ends}"
            );
        }
        assert_eq!(watts(&[(0.0, 5.0), (1.0, 5.0), (2.0, 6.0)]), None, "moved once");
        assert_eq!(watts(&[]), None);
    }

    #[test]
    fn samples_are_counted_over_the_time_they_took() {
        let begun = Instant::now();
        let counter = || Some((begun.elapsed().as_secs_f64() * 10.0).floor() * 30.0);
        let work = || {
            thread::sleep(Duration::from_millis(20));
            Ok(2)
        };
        let power = of(counter, work).unwrap().unwrap();
        assert!((power.watts - 300.0).abs() < 15.0, "{power:?}");
        assert!((0.01..0.015).contains(&power.seconds_per_sample), "{power:?}");
        assert_eq!(of(|| None, || Ok(1)).unwrap(), None);
    }
}
