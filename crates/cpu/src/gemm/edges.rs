//! The steps that are no arithmetic: pixels → patches, token ids → rows of the prefix stream.

use pirouette_model::Inputs;

use crate::driver::pool::Worker;
use crate::executable::Context;
use crate::plan::Place;

/// Where patches come from and go to.
pub(crate) struct PatchifyPlan {
    pub(crate) patches: Place,
    /// Side of a patch and of an image, in pixels.
    pub(crate) patch: usize,
    pub(crate) side: usize,
    pub(crate) rows: usize,
}

/// Where token rows come from and go to.
pub(crate) struct EmbedPlan {
    pub(crate) table: usize,
    pub(crate) scale: f32,
    pub(crate) image_tokens: usize,
    pub(crate) prompt_tokens: usize,
    pub(crate) out: Place,
}

/// This worker's share of `count` things.
fn share(worker: &Worker<'_>, count: usize) -> std::ops::Range<usize> {
    count * worker.index / worker.count..count * (worker.index + 1) / worker.count
}

/// patches[p, (row, column, channel)] = pixel − 128, real images only.
pub(crate) fn patchify(
    context: &Context<'_>,
    plan: &PatchifyPlan,
    inputs: &Inputs<'_>,
    worker: &Worker<'_>,
) {
    let (patch, side) = (plan.patch, plan.side);
    let (grid, line) = (side / patch, patch * 3);
    let rows = &context.rows[plan.rows].rows;
    for &(image, token) in &rows[share(worker, rows.len())] {
        let at = plan.patches.at(image as usize, token as usize);
        // SAFETY: this worker alone writes this row; nobody reads it during the step.
        let out: &mut [f32] = unsafe { context.arena.write(at..at + patch * line) };
        let (y, x) = (token as usize / grid * patch, token as usize % grid * patch);
        let pixels = inputs.images.get(image as usize, side * side * 3);
        for (row, out) in out.chunks_exact_mut(line).enumerate() {
            let from = ((y + row) * side + x) * 3;
            for (o, pixel) in out.iter_mut().zip(&pixels[from..from + line]) {
                *o = *pixel as f32 - 128.0;
            }
        }
    }
}

/// Rows after a sample's image tokens = scale · table[token], real tokens only.
pub(crate) fn embed(
    context: &Context<'_>,
    plan: &EmbedPlan,
    inputs: &Inputs<'_>,
    worker: &Worker<'_>,
) {
    for (sample, tokens) in inputs.tokens.chunks_exact(plan.prompt_tokens).enumerate() {
        let first = inputs.cameras[sample] as usize * plan.image_tokens;
        for j in share(worker, inputs.prompt_len[sample] as usize) {
            let at = plan.out.at(sample, first + j);
            // SAFETY: this worker alone writes this row; nobody reads it during the step.
            let out: &mut [f32] = unsafe { context.arena.write(at..at + plan.out.cols) };
            context.weights.token_row(plan.table, tokens[j] as usize, out);
            for o in out {
                *o *= plan.scale;
            }
        }
    }
}
