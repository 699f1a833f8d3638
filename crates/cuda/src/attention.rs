//! Host twin of the attention kernels, `embed.cu` and `patchify.cu`.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};
use pirouette_model::BackendError;

use crate::cubins;
use crate::driver::{Arg, Context, Function, Launch, Swizzle, TensorMap, TensorMapSpec};

/// `AttentionVisionParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct VisionParams {
    /// bf16 [images · 256, 1152].
    pub out: u64,
    /// Of q·kᵀ.
    pub scale: f32,
    /// images · 16
    pub heads: u32,
}

/// `AttentionPrefillParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct PrefillParams {
    /// bf16 [batch · out_stride, 2048].
    pub out: u64,
    /// u32 [batch][2].
    pub lengths: u64,
    /// Query rows of a sample.
    pub rows: u32,
    /// Rows from one sample's queries to the next's.
    pub q_stride: u32,
    /// Rows from one sample's outputs to the next's.
    pub out_stride: u32,
    /// Cache rows of a sample.
    pub cache_rows: u32,
    /// Rows of a camera.
    pub image_tokens: u32,
    /// Prefix slots.
    pub prefix_rows: u32,
    /// Keys of a sample behind them.
    pub suffix_keys: u32,
    /// 1: query row 0 is the state token.
    pub state_row: u32,
    /// Batch; set by the launch.
    pub samples: u32,
    /// 1: the prefix rows of the cache are complete.
    pub prefix_ready: u32,
}

/// `AttentionSuffixParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct SuffixParams {
    /// bf16 [batch · q_stride, 2048].
    pub q: u64,
    /// bf16 [batch · cache_rows, 256].
    pub k: u64,
    /// bf16 [batch · cache_rows, 256].
    pub v: u64,
    /// bf16 [batch · out_stride, 2048].
    pub out: u64,
    /// u32 [batch][2].
    pub lengths: u64,
    /// Query rows of a sample.
    pub queries: u32,
    /// Rows from one sample's queries to the next's.
    pub q_stride: u32,
    /// Rows from one sample's outputs to the next's.
    pub out_stride: u32,
    /// Elements from one row of `out` to the next.
    pub out_width: u32,
    /// Elements from 32 of its columns to the next 32.
    pub out_step: u32,
    /// Cache rows of a sample.
    pub cache_rows: u32,
    /// Prefix slots.
    pub prefix_rows: u32,
    /// Suffix keys.
    pub suffix_keys: u32,
    /// Rows of a camera.
    pub image_tokens: u32,
    /// Keys a CTA has room for.
    pub key_slots: u32,
    /// 1: query row 0 is the state token.
    pub state_row: u32,
    /// 1: the prefix rows of the cache are complete.
    pub prefix_ready: u32,
}

/// `EmbedParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct EmbedParams {
    /// u32 [batch][prompt_tokens].
    pub tokens: u64,
    /// u32 [batch][2].
    pub lengths: u64,
    /// bf16 [vocab][width].
    pub table: u64,
    /// bf16 [batch · rows][width].
    pub stream: u64,
    /// `stream` times `norm_scale`, or 0.
    pub scaled: u64,
    /// f32 [width], with `scaled` alone.
    pub norm_scale: u64,
    /// float2 [batch · rows][parts] or 0.
    pub stats: u64,
    /// Rows of the table.
    pub vocab: u32,
    /// Columns.
    pub width: u32,
    /// Prompt slots.
    pub prompt_tokens: u32,
    /// Prefix rows of a sample.
    pub rows: u32,
    /// Rows of a camera.
    pub image_tokens: u32,
    /// Statistics of a row.
    pub parts: u32,
    /// √width
    pub scale: f32,
    /// 0
    pub reserved: u32,
}

/// `PatchifyParams`
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct PatchifyParams {
    /// u8 [images][side][side][3].
    pub images: u64,
    /// bf16 [patches][stride].
    pub patches: u64,
    /// Pixels.
    pub side: u32,
    /// Pixels.
    pub patch: u32,
    /// Elements from one patch to the next.
    pub stride: u32,
    /// 0
    pub reserved: u32,
}

const _: () = assert!(size_of::<VisionParams>() == 16);
const _: () = assert!(size_of::<PrefillParams>() == 56);
const _: () = assert!(size_of::<SuffixParams>() == 88);
const _: () = assert!(size_of::<EmbedParams>() == 88);
const _: () = assert!(size_of::<PatchifyParams>() == 32);

const VISION_SHARED: u32 = 102_432;
const VISION_MANY_SHARED: u32 = 225_472;
/// From as many images on, whole heads one after the other are faster than 128 queries a CTA.
const VISION_MANY: u32 = 12;
const PREFILL_SHARED: u32 = 230_400;
const PREFILL_ROWS: u32 = 128;
const PREFILL_KEYS: u32 = 80;

/// Parts of the keys of the prefill's kernels: two fill the machine when the row tiles do not.
/// `hidden_suffix`: suffix keys, if a query row sees none but the first of them. Where they are
/// more than a tile, a second part could begin with a tile that this row sees nothing of, and a
/// softmax that begins so has no maximum; the only part begins with the prefix.
fn key_parts(row_tiles: u32, sms: u32, hidden_suffix: u32) -> u32 {
    if row_tiles <= sms / 2 && hidden_suffix <= PREFILL_KEYS { 2 } else { 1 }
}
/// CTAs that share the keys of the suffix kernel, and keys one of them holds.
const SUFFIX_CLUSTER: u32 = 8;
const MAX_KEY_SLOTS: usize = 128;
const MAX_SHARED: u32 = 232_448;

/// Room for keys a CTA of the suffix kernel needs; `None` if that is more than it has.
pub fn key_slots(prefix_rows: usize, suffix_keys: usize) -> Option<u32> {
    let cluster = SUFFIX_CLUSTER as usize;
    let keys = prefix_rows.div_ceil(cluster) + suffix_keys.div_ceil(cluster);
    let slots = keys.next_multiple_of(16);
    (slots <= MAX_KEY_SLOTS).then_some(slots as u32)
}

/// An instance of the suffix kernel: 16-row tiles per CTA.
struct Suffix {
    tiles: u32,
    function: Function,
}

/// The loaded kernels.
pub struct Attention {
    context: Arc<Context>,
    vision: Function,
    /// The same for many images.
    vision_many: Function,
    /// Prefix attention with the keys in one part and in two.
    prefill: [Function; 2],
    /// The same for the loop.
    batch: [Function; 2],
    suffix: Vec<Suffix>,
    embed: Function,
    patchify: Function,
}

impl Attention {
    /// Loads them; Hopper only.
    pub fn load(context: &Arc<Context>) -> Result<Self, BackendError> {
        let vision = cubins::load(context, "attention_vision_sm90")?;
        let prefill = cubins::load(context, "attention_prefill_sm90")?;
        let suffix = cubins::load(context, "attention_suffix")?;
        let prefill = |name: &str| -> Result<[Function; 2], BackendError> {
            let split = |split: u32| {
                let name = format!("attention_{name}_sm90_split{split}");
                prefill.function(&name, PREFILL_SHARED as usize)
            };
            Ok([split(1)?, split(2)?])
        };
        let suffix = [1, 2, 5]
            .into_iter()
            .map(|tiles| {
                let name = format!("attention_suffix_r{}_c{SUFFIX_CLUSTER}", 16 * tiles);
                let function = suffix.function(&name, MAX_SHARED as usize)?;
                Ok(Suffix { tiles, function })
            })
            .collect::<Result<_, BackendError>>()?;
        Ok(Attention {
            context: context.clone(),
            vision: vision.function("attention_vision_sm90", VISION_SHARED as usize)?,
            vision_many: vision
                .function("attention_vision_many_sm90", VISION_MANY_SHARED as usize)?,
            prefill: prefill("prefill")?,
            batch: prefill("batch")?,
            suffix,
            embed: cubins::load(context, "embed")?.function("embed", 0)?,
            patchify: cubins::load(context, "patchify")?.function("patchify", 0)?,
        })
    }

    /// SigLIP attention over `images` images of 256 tokens, 16 heads of 72: `qkv` bf16
    /// [images · 256, 3456]. `p.heads` is set here.
    pub fn vision(
        &self,
        mut p: VisionParams,
        qkv: u64,
        images: u32,
    ) -> Result<Launch, BackendError> {
        p.heads = 16 * images;
        // 72 columns are not a power of two: 64, and the rest padded with zeros to 16.
        let maps = |address, heads: u64, rows| -> Result<[Arg; 2], BackendError> {
            let map = |cols, swizzle| {
                let spec = TensorMapSpec {
                    address,
                    extents: &[72, heads, images as u64 * 256],
                    strides_bytes: &[144, heads * 144],
                    boxes: &[cols, 1, rows],
                    swizzle,
                };
                TensorMap::bf16(&self.context, &spec)
            };
            Ok([Arg::of(&map(64, Swizzle::B128)?), Arg::of(&map(16, Swizzle::B32)?)])
        };
        let mut args = vec![Arg::of(&p)];
        args.extend(maps(qkv, 48, 128)?);
        let (launch, shared_bytes) = if images < VISION_MANY {
            let function = self.vision.clone();
            (Launch::new(function, [2, 16, images], 256, args), VISION_SHARED)
        } else {
            args.extend(maps(p.out, 16, 64)?);
            let grid = [p.heads.min(self.context.properties.sms), 1, 1];
            (Launch::new(self.vision_many.clone(), grid, 384, args), VISION_MANY_SHARED)
        };
        Ok(Launch { shared_bytes, dependent: true, ..launch })
    }

    /// Prefix attention, 8 heads of 256 over one K/V head.
    pub fn prefill(
        &self,
        p: PrefillParams,
        operands: [u64; 3],
        samples: u32,
    ) -> Result<Launch, BackendError> {
        self.wide(&self.prefill, p, operands, samples, true)
    }

    /// `walks`: the CTAs of the kernel with the keys in one part go from row tile to row tile.
    fn wide(
        &self,
        functions: &[Function; 2],
        mut p: PrefillParams,
        [q, k, v]: [u64; 3],
        samples: u32,
        walks: bool,
    ) -> Result<Launch, BackendError> {
        p.samples = samples;
        let map = |address, rows: u32, box_rows| {
            let spec = TensorMapSpec {
                address,
                extents: &[256, rows as u64],
                strides_bytes: &[512],
                boxes: &[64, box_rows],
                swizzle: Swizzle::B128,
            };
            TensorMap::bf16(&self.context, &spec)
        };
        let cache = samples * p.cache_rows;
        let args = vec![
            Arg::of(&p),
            Arg::of(&map(q, samples * p.q_stride * 8, PREFILL_ROWS)?),
            Arg::of(&map(k, cache, PREFILL_KEYS)?),
            Arg::of(&map(v, cache, PREFILL_KEYS)?),
        ];
        let tiles = (8 * p.rows).div_ceil(PREFILL_ROWS);
        let sms = self.context.properties.sms;
        let hides = p.state_row != 0;
        let split = key_parts(tiles * samples, sms, if hides { p.suffix_keys } else { 0 });
        let function = functions[split as usize - 1].clone();
        let grid = match split {
            1 if walks => [sms.min(tiles * samples), 1, 1],
            _ => [tiles * split, samples, 1],
        };
        let launch = Launch::new(function, grid, 384, args);
        let cluster = [split, 1, 1];
        Ok(Launch { shared_bytes: PREFILL_SHARED, cluster, dependent: true, ..launch })
    }

    /// Denoise attention; `p.key_slots` is set here. `None` when a sample has more keys than a
    /// cluster takes.
    pub fn suffix(&self, p: SuffixParams, samples: u32) -> Result<Option<Launch>, BackendError> {
        let rows = 8 * p.queries;
        // Enough rows to fill the machine in tiles of 128: the prefill's way.
        if rows.div_ceil(PREFILL_ROWS) * samples >= 24 && (p.out_width, p.out_step) == (2048, 32) {
            let wide = PrefillParams {
                out: p.out,
                lengths: p.lengths,
                rows: p.queries,
                q_stride: p.q_stride,
                out_stride: p.out_stride,
                cache_rows: p.cache_rows,
                image_tokens: p.image_tokens,
                prefix_rows: p.prefix_rows,
                suffix_keys: p.suffix_keys,
                state_row: p.state_row,
                prefix_ready: p.prefix_ready,
                ..PrefillParams::default()
            };
            return self.wide(&self.batch, wide, [p.q, p.k, p.v], samples, false).map(Some);
        }
        Ok(self.split(p, rows, samples))
    }

    /// The keys of 16 to 80 rows split over a cluster.
    fn split(&self, mut p: SuffixParams, rows: u32, samples: u32) -> Option<Launch> {
        // Measured at P = 788: narrow tiles while all clusters fit the machine, wide ones once
        // the keys are fetched many times over.
        let wanted = match rows.div_ceil(16) * samples {
            0..=28 => 1,
            29..=96 => 2,
            _ => 5,
        };
        let Suffix { tiles, function } = self.suffix.iter().find(|s| s.tiles == wanted)?;
        p.key_slots = key_slots(p.prefix_rows as usize, p.suffix_keys as usize)?;
        let m = 16 * tiles;
        let shared_bytes =
            m * (656 + 2 * p.key_slots + 8 * SUFFIX_CLUSTER) + p.key_slots * 528 + 16;
        let grid = [SUFFIX_CLUSTER, rows.div_ceil(m), samples];
        let launch = Launch::new(function.clone(), grid, 256, vec![Arg::of(&p)]);
        Some(Launch { shared_bytes, cluster: [SUFFIX_CLUSTER, 1, 1], dependent: true, ..launch })
    }

    /// Prompt tokens to stream rows with their statistics.
    pub fn embed(&self, p: EmbedParams, samples: u32) -> Launch {
        let grid = [p.rows, samples, 1];
        let launch = Launch::new(self.embed.clone(), grid, 256, vec![Arg::of(&p)]);
        Launch { dependent: true, ..launch }
    }

    /// Images to patches.
    pub fn patchify(&self, p: PatchifyParams, images: u32) -> Launch {
        let grid = [p.side / p.patch, images, 1];
        let shared_bytes = (p.patch * p.side * 3).next_multiple_of(16);
        let launch = Launch::new(self.patchify.clone(), grid, 256, vec![Arg::of(&p)]);
        Launch { shared_bytes, dependent: true, ..launch }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_in_one_part_where_a_row_may_see_none_of_the_second() {
        // No row that sees less than others, and one with as many suffix keys as a tile has.
        for hidden in [0, PREFILL_KEYS] {
            assert_eq!([24, 66, 67].map(|tiles| key_parts(tiles, 132, hidden)), [2, 2, 1]);
        }
        // π0, h = 288, two samples: the second part began with suffix keys alone.
        assert_eq!(key_parts(38, 132, 289), 1);
    }
}
