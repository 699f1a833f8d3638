//! A GPU's ladder: portable kernels launched one by one → hand-written ones → one graph → what it
//! overlaps.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use pirouette_cuda::{Choices, CudaDevice, CudaExecutable, Tier};
use pirouette_model::{Config, Executable, Program, Shape, WeightTable, record_with};

use super::{Ladder, Rung};
use crate::profile::{Repeats, Timing, summary};
use crate::random::RandomInputs;

/// Measures the rungs this GPU has kernels for.
pub fn choices(
    device: &mut CudaDevice,
    config: &Config,
    shape: Shape,
    repeats: Repeats,
) -> Result<Ladder> {
    let table = Arc::new(WeightTable::new(*config, shape.steps));
    let program = Arc::new(record_with(table, shape)?);
    device.set_tier(Tier::Portable);
    let portable = device.compile_cuda(program.clone());
    device.set_tier(Tier::Auto);
    let mut portable = portable?;
    let kernels = |e: &CudaExecutable| format!("{} kernels", e.kernel_count());
    let mut rungs = vec![Rung {
        name: "portable, launched one by one".into(),
        change: format!("portable kernels, {} queued each by itself", kernels(&portable)),
        timing: one_by_one(&mut portable, config, repeats)?,
    }];
    let portable_kernels = portable.kernel_count();
    drop(portable);
    let mut compile = |attention, dependent, beside| {
        device.set_choices(Choices { attention, dependent, beside });
        let compiled = device.compile_cuda(program.clone());
        device.set_choices(Choices::default());
        compiled
    };
    let mut plain = compile(true, false, false)?;
    // Where there are no others for this GPU or these sizes, both tiers plan the same launches.
    let others = plain.kernel_count() != portable_kernels;
    if others {
        let mut products = compile(false, false, false)?;
        rungs.push(Rung {
            name: "hand-written kernels, but for attention".into(),
            change: format!(
                "kernels for this GPU, {} queued each by itself; attention of vision and prefill \
                 as before",
                kernels(&products)
            ),
            timing: one_by_one(&mut products, config, repeats)?,
        });
        drop(products);
        rungs.push(Rung {
            name: "hand-written attention".into(),
            change: format!("{}, all for this GPU", kernels(&plain)),
            timing: one_by_one(&mut plain, config, repeats)?,
        });
    }
    rungs.push(Rung {
        name: "one graph".into(),
        change: "the same kernels captured once and launched as one graph".into(),
        timing: graph(&mut plain, config, repeats)?,
    });
    drop(plain);
    if others {
        rungs.push(Rung {
            name: "dependent launch".into(),
            change: "each kernel starts before the one in front of it has ended".into(),
            timing: graph(&mut compile(true, true, false)?, config, repeats)?,
        });
    }
    let mut whole = compile(true, true, true)?;
    let beside = whole.kernels_beside();
    if beside > 0 {
        rungs.push(Rung {
            name: "first step beside the prefill".into(),
            change: format!("{beside} of {} on a branch of the graph", kernels(&whole)),
            timing: graph(&mut whole, config, repeats)?,
        });
    }
    let title = "Kernels and the graph, the same program".into();
    let clock = "kernels only: inputs and actions stay on the device".into();
    Ok(Ladder { title, clock, rungs })
}

/// Inputs on the device, from one whole run.
fn fill(executable: &mut CudaExecutable, config: &Config) -> Result<Arc<Program>> {
    let program = executable.program().clone();
    let sample = RandomInputs::new(config, program.shape, 1);
    executable.run(&sample.inputs(), &mut vec![0.0; sample.noise.len()])?;
    Ok(program)
}

fn one_by_one(
    executable: &mut CudaExecutable,
    config: &Config,
    repeats: Repeats,
) -> Result<Timing> {
    let program = fill(executable, config)?;
    let mut total = Vec::new();
    for i in 0..repeats.warmup + repeats.runs {
        let start = Instant::now();
        executable.run_steps(0..program.steps.len())?;
        if i >= repeats.warmup {
            total.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    Ok(summary(program.shape, &total, &[], None))
}

fn graph(executable: &mut CudaExecutable, config: &Config, repeats: Repeats) -> Result<Timing> {
    let program = fill(executable, config)?;
    executable.replay_ms(repeats.warmup)?;
    let total = executable.replay_ms(repeats.runs)?;
    let stages = executable.stage_ms(repeats.runs)?;
    Ok(summary(program.shape, &total, &stages, None))
}
