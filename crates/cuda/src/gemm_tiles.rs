//! Which instance of the products' kernels takes a product: their list, the estimate, what was
//! measured otherwise.

use std::ops::RangeInclusive;

/// `gemm::Epilogue`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmEpilogue {
    /// y
    Store,
    /// y + position table
    StorePosition,
    /// gelu(y)
    Gelu,
    /// gelu(gate) · up
    GeGlu,
    /// out + y
    Add,
    /// q, k rotated; v
    Rope,
    /// The loop's y; its f32 weights may be two matrices side by side
    LoopStore,
    /// The loop's gelu(gate) · up
    LoopGeGlu,
    /// The loop's out + gate · y
    LoopAdd,
    /// The loop's q, k rotated; v
    LoopRope,
    /// E4M3 of gelu(gate) · up; E4M3 operands
    E4m3GeGlu,
    /// out + y; E4M3 operands
    E4m3Add,
}

impl GemmEpilogue {
    pub fn of_loop(self) -> bool {
        matches!(self, Self::LoopStore | Self::LoopGeGlu | Self::LoopAdd | Self::LoopRope)
    }

    fn adds(self) -> bool {
        matches!(self, Self::Add | Self::LoopAdd | Self::E4m3Add)
    }

    pub fn takes_e4m3(self) -> bool {
        matches!(self, Self::E4m3GeGlu | Self::E4m3Add)
    }

    /// Columns of one stage: a 128-byte swizzled row.
    fn k_step(self) -> u32 {
        if self.takes_e4m3() { 128 } else { 64 }
    }
}

/// One instance of the kernel, as `GEMM_INSTANCES` or `GEMM_LOOP_INSTANCES` lists it.
pub struct Tile {
    /// Of the kernel.
    pub name: &'static str,
    /// Warpgroups on the products.
    pub consumers: u32,
    /// 64-row blocks of weight per consumer.
    mi: u32,
    /// Tokens of a tile; upright: features, and the 64-row blocks are of tokens.
    pub bn: u32,
    stages: u32,
    /// CTAs that share a token tile, a weight tile, the sum over K.
    pub cluster: [u32; 3],
    /// Whether consumers take whole tiles in turn.
    turns: bool,
    /// Whether tokens are wgmma's M. Such an instance leaves no statistics and no scaled copy, and
    /// its rows follow each other as those of x.
    pub upright: bool,
    pub epilogue: GemmEpilogue,
}

const fn tile(
    name: &'static str,
    [consumers, mi, bn, stages]: [u32; 4],
    cluster: [u32; 3],
    turns: bool,
    epilogue: GemmEpilogue,
) -> Tile {
    Tile { name, consumers, mi, bn, stages, cluster, turns, upright: false, epilogue }
}

const fn upright(
    name: &'static str,
    sizes: [u32; 4],
    cluster: [u32; 3],
    epilogue: GemmEpilogue,
) -> Tile {
    Tile { upright: true, ..tile(name, sizes, cluster, false, epilogue) }
}

/// Of equal estimates the first is taken.
pub const TILES: &[Tile] = {
    use GemmEpilogue::{Add, E4m3Add, E4m3GeGlu, GeGlu, Gelu, Rope, Store, StorePosition};
    use GemmEpilogue::{LoopAdd, LoopGeGlu, LoopRope, LoopStore};
    &[
        tile("gemm_geglu_128x144_t_w2", [2, 2, 144, 5], [1, 2, 1], true, GeGlu),
        tile("gemm_geglu_128x144_t_x2", [2, 2, 144, 5], [2, 1, 1], true, GeGlu),
        tile("gemm_geglu_128x152_t_x2", [2, 2, 152, 5], [2, 1, 1], true, GeGlu),
        tile("gemm_geglu_128x168_t_w2", [2, 2, 168, 4], [1, 2, 1], true, GeGlu),
        tile("gemm_geglu_128x168_t_x2", [2, 2, 168, 4], [2, 1, 1], true, GeGlu),
        tile("gemm_geglu_128x184_t_w2", [2, 2, 184, 4], [1, 2, 1], true, GeGlu),
        tile("gemm_geglu_128x184_t_x2", [2, 2, 184, 4], [2, 1, 1], true, GeGlu),
        tile("gemm_geglu_128x200_t_x2", [2, 2, 200, 4], [2, 1, 1], true, GeGlu),
        tile("gemm_geglu_256x192_w2", [2, 2, 192, 3], [1, 2, 1], false, GeGlu),
        tile("gemm_add_128x64", [2, 1, 64, 8], [1, 1, 1], false, Add),
        tile("gemm_add_128x72", [2, 1, 72, 8], [1, 1, 1], false, Add),
        tile("gemm_add_128x104_w2", [2, 1, 104, 6], [1, 2, 1], false, Add),
        tile("gemm_add_128x128", [2, 1, 128, 6], [1, 1, 1], false, Add),
        tile("gemm_add_128x216", [2, 1, 216, 4], [1, 1, 1], false, Add),
        tile("gemm_add_128x48_k2", [2, 1, 48, 8], [1, 1, 2], false, Add),
        tile("gemm_add_128x72_k2", [2, 1, 72, 8], [1, 1, 2], false, Add),
        tile("gemm_add_128x80_k2", [2, 1, 80, 8], [1, 1, 2], false, Add),
        tile("gemm_add_128x96_k2", [2, 1, 96, 7], [1, 1, 2], false, Add),
        tile("gemm_add_128x120_k2", [2, 1, 120, 6], [1, 1, 2], false, Add),
        tile("gemm_add_128x128_w2_k2", [2, 1, 128, 6], [1, 2, 2], false, Add),
        tile("gemm_add_128x136_k2", [2, 1, 136, 6], [1, 1, 2], false, Add),
        tile("gemm_add_128x168_k2", [2, 1, 168, 4], [1, 1, 2], false, Add),
        tile("gemm_add_128x184_k2", [2, 1, 184, 4], [1, 1, 2], false, Add),
        tile("gemm_add_128x200_k2", [2, 1, 200, 4], [1, 1, 2], false, Add),
        tile("gemm_add_128x224_k2", [2, 1, 224, 4], [1, 1, 2], false, Add),
        tile("gemm_add_128x248_k2", [2, 1, 248, 4], [1, 1, 2], false, Add),
        tile("gemm_add_128x200_w2", [2, 1, 200, 4], [1, 2, 1], false, Add),
        tile("gemm_add_128x192_t_x2", [2, 2, 192, 4], [2, 1, 1], true, Add),
        tile("gemm_add_128x192_t_w2", [2, 2, 192, 4], [1, 2, 1], true, Add),
        tile("gemm_add_256x192_w2", [2, 2, 192, 3], [1, 2, 1], false, Add),
        tile("gemm_add_256x200_w2", [2, 2, 200, 3], [1, 2, 1], false, Add),
        tile("gemm_rope_128x32", [2, 1, 32, 8], [1, 1, 1], false, Rope),
        tile("gemm_rope_128x48", [2, 1, 48, 8], [1, 1, 1], false, Rope),
        tile("gemm_rope_128x64", [2, 1, 64, 8], [1, 1, 1], false, Rope),
        tile("gemm_rope_128x80", [2, 1, 80, 7], [1, 1, 1], false, Rope),
        tile("gemm_rope_128x96", [2, 1, 96, 7], [1, 1, 1], false, Rope),
        tile("gemm_rope_128x120", [2, 1, 120, 6], [1, 1, 1], false, Rope),
        tile("gemm_rope_128x168", [2, 1, 168, 4], [1, 1, 1], false, Rope),
        tile("gemm_rope_128x136_w2", [2, 1, 136, 5], [1, 2, 1], false, Rope),
        tile("gemm_rope_128x192_t_x2", [2, 2, 192, 4], [2, 1, 1], true, Rope),
        tile("gemm_store_128x64", [2, 1, 64, 8], [1, 1, 1], false, Store),
        tile("gemm_store_128x96", [2, 1, 96, 7], [1, 1, 1], false, Store),
        tile("gemm_store_128x128", [2, 1, 128, 6], [1, 1, 1], false, Store),
        tile("gemm_store_128x192_t_w2", [2, 2, 192, 4], [1, 2, 1], true, Store),
        upright("gemm_store_u128x160_x2", [2, 1, 160, 5], [2, 1, 1], Store),
        tile("gemm_gelu_128x88", [2, 1, 88, 7], [1, 1, 1], false, Gelu),
        tile("gemm_gelu_192x104", [3, 1, 104, 5], [1, 1, 1], false, Gelu),
        tile("gemm_gelu_128x192_t_x2", [2, 2, 192, 4], [2, 1, 1], true, Gelu),
        upright("gemm_gelu_u128x200_x2", [2, 1, 200, 4], [2, 1, 1], Gelu),
        tile("gemm_store_position_128x40", [2, 1, 40, 8], [1, 1, 1], false, StorePosition),
        tile("gemm_store_position_128x64", [2, 1, 64, 8], [1, 1, 1], false, StorePosition),
        tile("gemm_store_position_128x192_t_w2", [2, 2, 192, 4], [1, 2, 1], true, StorePosition),
        tile("gemm_loop_rope_128x32", [2, 1, 32, 8], [1, 1, 1], false, LoopRope),
        tile("gemm_loop_rope_128x40", [2, 1, 40, 8], [1, 1, 1], false, LoopRope),
        tile("gemm_loop_rope_128x64", [2, 1, 64, 8], [1, 1, 1], false, LoopRope),
        tile("gemm_loop_rope_128x112", [2, 1, 112, 6], [1, 1, 1], false, LoopRope),
        tile("gemm_loop_rope_128x136", [2, 1, 136, 5], [1, 1, 1], false, LoopRope),
        tile("gemm_loop_rope_128x208", [2, 1, 208, 4], [1, 1, 1], false, LoopRope),
        tile("gemm_loop_geglu_128x88_t_x2", [2, 2, 88, 7], [2, 1, 1], true, LoopGeGlu),
        tile("gemm_loop_geglu_128x104_t_x2", [2, 2, 104, 6], [2, 1, 1], true, LoopGeGlu),
        tile("gemm_loop_geglu_128x160_t_x2", [2, 2, 160, 5], [2, 1, 1], true, LoopGeGlu),
        tile("gemm_loop_geglu_128x176_t_x2", [2, 2, 176, 4], [2, 1, 1], true, LoopGeGlu),
        tile("gemm_loop_geglu_256x160_w2", [2, 2, 160, 3], [1, 2, 1], false, LoopGeGlu),
        tile("gemm_loop_add_128x32_k2", [2, 1, 32, 8], [1, 1, 2], false, LoopAdd),
        tile("gemm_loop_add_128x48_k2", [2, 1, 48, 8], [1, 1, 2], false, LoopAdd),
        tile("gemm_loop_add_128x80_k2", [2, 1, 80, 8], [1, 1, 2], false, LoopAdd),
        tile("gemm_loop_add_128x88_k2", [2, 1, 88, 7], [1, 1, 2], false, LoopAdd),
        tile("gemm_loop_add_128x104_k2", [2, 1, 104, 6], [1, 1, 2], false, LoopAdd),
        tile("gemm_loop_add_128x208", [2, 1, 208, 4], [1, 1, 1], false, LoopAdd),
        tile("gemm_loop_store_128x48_k2", [2, 1, 48, 8], [1, 1, 2], false, LoopStore),
        tile("gemm_loop_store_128x80_k2", [2, 1, 80, 8], [1, 1, 2], false, LoopStore),
        tile("gemm_loop_store_128x104_k2", [2, 1, 104, 6], [1, 1, 2], false, LoopStore),
        tile("gemm_loop_store_128x208", [2, 1, 208, 4], [1, 1, 1], false, LoopStore),
        tile("gemm_e4m3_geglu_128x144_t_x2", [2, 2, 144, 5], [2, 1, 1], true, E4m3GeGlu),
        tile("gemm_e4m3_geglu_128x168_t_x2", [2, 2, 168, 4], [2, 1, 1], true, E4m3GeGlu),
        tile("gemm_e4m3_geglu_128x184_t_x2", [2, 2, 184, 4], [2, 1, 1], true, E4m3GeGlu),
        tile("gemm_e4m3_geglu_128x200_t_x2", [2, 2, 200, 4], [2, 1, 1], true, E4m3GeGlu),
        tile("gemm_e4m3_add_128x72_k2", [2, 1, 72, 8], [1, 1, 2], false, E4m3Add),
        tile("gemm_e4m3_add_128x104_k2", [2, 1, 104, 6], [1, 1, 2], false, E4m3Add),
        tile("gemm_e4m3_add_128x136_k2", [2, 1, 136, 6], [1, 1, 2], false, E4m3Add),
        tile("gemm_e4m3_add_128x184_k2", [2, 1, 184, 4], [1, 1, 2], false, E4m3Add),
        tile("gemm_e4m3_add_128x200_k2", [2, 1, 200, 4], [1, 1, 2], false, E4m3Add),
        tile("gemm_e4m3_add_128x248_k2", [2, 1, 248, 4], [1, 1, 2], false, E4m3Add),
        tile("gemm_e4m3_add_128x200_w2", [2, 1, 200, 4], [1, 2, 1], false, E4m3Add),
        tile("gemm_e4m3_add_128x192_t_x2", [2, 2, 192, 4], [2, 1, 1], true, E4m3Add),
        tile("gemm_e4m3_add_256x192_w2", [2, 2, 192, 3], [1, 2, 1], false, E4m3Add),
    ]
};

/// Rows and tiles of a product are below 2²⁰, where the kernels' `quotient` is exact.
pub const MOST_ROWS: u32 = 1 << 17;

impl Tile {
    pub fn bm(&self) -> u32 {
        64 * self.mi * if self.turns { 1 } else { self.consumers }
    }

    pub fn cluster_size(&self) -> u32 {
        self.cluster.iter().product()
    }

    /// 8-token groups that one CTA finishes.
    pub fn own(&self) -> u32 {
        (self.bn / 8).div_ceil(self.cluster[2])
    }

    /// Whether the copy engine brings what is added to the product, or takes that away
    /// (`Tile::BULK`).
    pub fn maps_out(&self) -> bool {
        use GemmEpilogue::{Gelu, Rope, Store};
        let bulk = self.mi == 2 && matches!(self.epilogue, Store | Gelu);
        self.epilogue.adds() || self.epilogue == Rope || bulk
    }

    /// `Tile::SMEM` of the kernel.
    pub fn shared_bytes(&self) -> u32 {
        use GemmEpilogue::{Add, LoopAdd, LoopRope, Rope, StorePosition};
        let ring = self.stages * (self.bm() + self.bn) * 128;
        let barriers = 8 * (2 * self.stages + 7 + 2 * self.consumers);
        if self.upright {
            let staging = self.consumers * 64 * ((self.bn / 8) | 1) * 16;
            return ring + staging + 2 * 8 * (self.bm() + self.bn) + barriers;
        }
        let staging = self.consumers * self.own() * 8 * 128;
        let plain = matches!(self.epilogue, Add | LoopAdd | StorePosition);
        let records = if plain { 0 } else { self.bn * 8 };
        let positions = if matches!(self.epilogue, Rope | LoopRope) { self.bn * 4 } else { 0 };
        ring + staging + 2 * (records + positions) + barriers
    }

    /// Clusters of work for a product.
    pub fn tiles(&self, rows: u32, n: u32) -> u32 {
        let [m, n] = if self.upright { [rows, n] } else { [n, rows] };
        m.div_ceil(self.bm() * self.cluster[0]) * n.div_ceil(self.bn * self.cluster[1])
    }

    /// Clusters that run at a time: processor groups of a Hopper hold 16 or 18 processors, so that
    /// clusters of four leave some idle.
    pub fn at_once(&self, sms: u32) -> u32 {
        let usable = if self.cluster_size() > 2 { sms / 11 * 10 } else { sms };
        (usable / self.cluster_size()).max(1)
    }

    /// Estimated clocks on `sms` processors; the formula of `gemm_sm90.cu`, which says how well it
    /// fits the measurements.
    fn cost(&self, rows: u32, n: u32, k: u32, sms: u32) -> u64 {
        let (bm, bn, parts) = (self.bm() as u64, self.bn as u64, self.cluster[2] as u64);
        let waves = self.tiles(rows, n).div_ceil(self.at_once(sms)) as u64;
        // A product of a millisecond meets the power limit: moving operands slows its clock.
        let long = rows as u64 * n as u64 * k as u64 > 1 << 38;
        let moving = if long { (bm + bn) * 17 / 32 } else { 0 };
        let stage = (bm * bn / 32 + moving).max((bm + bn) * 12 / 5);
        let main = k.div_ceil(self.epilogue.k_step()) as u64 * stage / parts;
        let epilogues = if self.turns { 1 } else { waves };
        let exchange = if parts > 1 { 1250 * parts } else { 0 };
        3000 + waves * main + epilogues * 30 * bn * bm / 128 + exchange
    }
}

/// Rows, n and k at which another instance than the estimate's was measured faster, on cards of 132
/// multiprocessors. A range of rows has the same tiles as the ones measured (788 a sample), or so
/// many that a tile more is nothing.
const MEASURED: &[(GemmEpilogue, RangeInclusive<u32>, [u32; 2], &str)] = &[
    (GemmEpilogue::Store, 1536..=1536, [3456, 1152], "gemm_store_u128x160_x2"),
    (GemmEpilogue::Store, 3072..=3072, [3456, 1152], "gemm_store_u128x160_x2"),
    (GemmEpilogue::Add, 768..=768, [1152, 4304], "gemm_add_128x128_w2_k2"),
    (GemmEpilogue::Add, 1536..=1536, [1152, 4304], "gemm_add_128x128"),
    (GemmEpilogue::Add, 512..=512, [1152, 1152], "gemm_add_128x64"),
    (GemmEpilogue::Add, 3073..=3200, [2048, 16384], "gemm_add_256x200_w2"),
    (GemmEpilogue::GeGlu, 50_000..=u32::MAX, [32768, 2048], "gemm_geglu_256x192_w2"),
    (GemmEpilogue::LoopGeGlu, 609..=640, [8192, 1024], "gemm_loop_geglu_256x160_w2"),
];

/// The instance for a product of `rows` × `n` × `k`; a `plain` one leaves no statistics, no scaled
/// copy, no gaps between samples.
pub fn choose(
    epilogue: GemmEpilogue,
    size: [u32; 3],
    plain: bool,
    sms: u32,
) -> Option<(usize, &'static Tile)> {
    let [rows, n, k] = size;
    let measured = MEASURED
        .iter()
        .find(|(e, r, s, _)| sms == 132 && *e == epilogue && r.contains(&rows) && *s == [n, k]);
    let named = |t: &Tile| measured.is_none_or(|(_, _, _, name)| t.name == *name);
    let able = |t: &Tile| t.epilogue == epilogue && (plain || !t.upright) && named(t);
    let fitting = TILES.iter().enumerate().filter(|(_, t)| able(t));
    fitting.min_by_key(|(_, t)| t.cost(rows, n, k, sms))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Products as wide as a tower's stream leave statistics.
    fn plain([_, n, _]: [u32; 3]) -> bool {
        ![1152, 2048, 1024].contains(&n)
    }

    /// The winners of the isolated measurements, at batch 1 and of three cameras unless said.
    #[test]
    fn measured_winners_are_chosen() {
        use GemmEpilogue::{Add, GeGlu, Gelu, Rope, Store, StorePosition};
        for (epilogue, size, want) in [
            (StorePosition, [768, 1152, 588], "gemm_store_position_128x64"),
            (Store, [768, 3456, 1152], "gemm_store_u128x160_x2"),
            (Store, [1536, 3456, 1152], "gemm_store_u128x160_x2"),
            (Store, [3072, 3456, 1152], "gemm_store_u128x160_x2"),
            (Add, [768, 1152, 1152], "gemm_add_128x64"),
            (Gelu, [768, 4304, 1152], "gemm_gelu_u128x200_x2"),
            (Gelu, [1536, 4304, 1152], "gemm_gelu_u128x200_x2"),
            (Add, [768, 1152, 4304], "gemm_add_128x128_w2_k2"),
            (Store, [768, 2048, 1152], "gemm_store_128x96"),
            (Rope, [788, 2560, 2048], "gemm_rope_128x136_w2"),
            (Rope, [788, 512, 2048], "gemm_rope_128x32"),
            (Add, [788, 2048, 2048], "gemm_add_128x104_w2"),
            (GeGlu, [788, 32768, 2048], "gemm_geglu_128x200_t_x2"),
            (Add, [788, 2048, 16384], "gemm_add_128x200_k2"),
            (Add, [968, 2048, 16384], "gemm_add_128x248_k2"),
            // Two cameras, one.
            (Store, [512, 3456, 1152], "gemm_store_128x128"),
            (Gelu, [512, 4304, 1152], "gemm_gelu_192x104"),
            (Rope, [532, 2560, 2048], "gemm_rope_128x96"),
            (Add, [532, 2048, 2048], "gemm_add_128x136_k2"),
            (GeGlu, [532, 32768, 2048], "gemm_geglu_128x184_t_x2"),
            (Add, [532, 2048, 16384], "gemm_add_128x136_k2"),
            (GeGlu, [712, 32768, 2048], "gemm_geglu_128x184_t_w2"),
            (Add, [712, 2048, 16384], "gemm_add_128x184_k2"),
            (Store, [256, 3456, 1152], "gemm_store_128x64"),
            (Gelu, [256, 4304, 1152], "gemm_gelu_128x88"),
            (Add, [256, 1152, 4304], "gemm_add_128x48_k2"),
            (Rope, [276, 2560, 2048], "gemm_rope_128x48"),
            (Add, [276, 2048, 2048], "gemm_add_128x72_k2"),
            (GeGlu, [276, 32768, 2048], "gemm_geglu_128x144_t_w2"),
            (Add, [276, 2048, 16384], "gemm_add_128x72_k2"),
            // Batches of 4, 8, 16, 64.
            (Add, [3152, 2048, 16384], "gemm_add_256x200_w2"),
            (Add, [3200, 2048, 16384], "gemm_add_256x200_w2"),
            (GeGlu, [51200, 32768, 2048], "gemm_geglu_256x192_w2"),
            (Add, [6304, 2048, 16384], "gemm_add_128x192_t_x2"),
            (Add, [12608, 2048, 16384], "gemm_add_256x192_w2"),
            (Add, [50432, 2048, 16384], "gemm_add_256x192_w2"),
            (Add, [50432, 2048, 2048], "gemm_add_128x192_t_x2"),
            (GeGlu, [50432, 32768, 2048], "gemm_geglu_256x192_w2"),
            (Add, [49152, 1152, 4304], "gemm_add_128x192_t_w2"),
            (Gelu, [49152, 4304, 1152], "gemm_gelu_128x192_t_x2"),
        ] {
            let chosen = choose(epilogue, size, plain(size), 132).map(|(_, tile)| tile.name);
            assert_eq!(chosen, Some(want), "{size:?}");
        }
    }

    /// Of one to three cameras, of long prompts and batches.
    #[test]
    fn fp8_has_tiles_for_its_shapes() {
        use GemmEpilogue::{E4m3Add, E4m3GeGlu};
        for (rows, up, down) in [
            (276, "geglu_128x144_t_x2", "add_128x72_k2"),
            (340, "geglu_128x184_t_x2", "add_128x104_k2"),
            (456, "geglu_128x168_t_x2", "add_128x136_k2"),
            (532, "geglu_128x184_t_x2", "add_128x136_k2"),
            (712, "geglu_128x184_t_x2", "add_128x184_k2"),
            (788, "geglu_128x200_t_x2", "add_128x200_k2"),
            (968, "geglu_128x200_t_x2", "add_128x248_k2"),
            (1576, "geglu_128x200_t_x2", "add_128x200_w2"),
            (6304, "geglu_128x184_t_x2", "add_128x192_t_x2"),
            (50432, "geglu_128x200_t_x2", "add_256x192_w2"),
        ] {
            for (epilogue, [n, k], want) in
                [(E4m3GeGlu, [32768, 2048], up), (E4m3Add, [2048, 16384], down)]
            {
                let chosen = choose(epilogue, [rows, n, k], false, 132).map(|(_, t)| t.name);
                assert_eq!(chosen, Some(format!("gemm_e4m3_{want}").as_str()), "{rows} rows");
            }
        }
    }

    /// The shapes of batches of 16, 32 and 64 at horizons of 10 and 50.
    #[test]
    fn the_loop_has_tiles_for_its_batches() {
        use GemmEpilogue::{LoopAdd, LoopGeGlu, LoopRope, LoopStore};
        for (epilogue, size, want) in [
            (LoopRope, [160, 2560, 1024], "gemm_loop_rope_128x32"),
            (LoopGeGlu, [160, 8192, 1024], "gemm_loop_geglu_128x88_t_x2"),
            (LoopAdd, [160, 1024, 4096], "gemm_loop_add_128x32_k2"),
            (LoopGeGlu, [200, 8192, 1024], "gemm_loop_geglu_128x104_t_x2"),
            (LoopRope, [640, 2560, 1024], "gemm_loop_rope_128x112"),
            (LoopRope, [320, 2560, 1024], "gemm_loop_rope_128x64"),
            (LoopRope, [816, 2560, 1024], "gemm_loop_rope_128x136"),
            (LoopAdd, [640, 1024, 2048], "gemm_loop_add_128x80_k2"),
            (LoopAdd, [704, 1024, 4096], "gemm_loop_add_128x88_k2"),
            (LoopAdd, [320, 1024, 4096], "gemm_loop_add_128x48_k2"),
            (LoopAdd, [800, 1024, 2048], "gemm_loop_add_128x104_k2"),
            (LoopStore, [640, 1024, 2048], "gemm_loop_store_128x80_k2"),
            (LoopGeGlu, [640, 8192, 1024], "gemm_loop_geglu_256x160_w2"),
            (LoopGeGlu, [704, 8192, 1024], "gemm_loop_geglu_128x176_t_x2"),
        ] {
            let chosen = choose(epilogue, size, plain(size), 132).map(|(_, tile)| tile.name);
            assert_eq!(chosen, Some(want), "{size:?}");
        }
    }

    #[test]
    fn measured_choices_exist() {
        for (epilogue, rows, [n, k], name) in MEASURED {
            for rows in [*rows.start(), *rows.end()] {
                let chosen = choose(*epilogue, [rows, *n, *k], true, 132);
                assert_eq!(chosen.map(|(_, tile)| tile.name), Some(*name), "{rows} rows");
            }
        }
    }

    /// `quotient` of the kernels, with `__fdividef`'s two ulps either way.
    #[test]
    fn quotients_are_exact_for_the_rows_that_are_taken() {
        let check = |a: u32, b: u32| {
            let divided = (a as f32 + 0.5) / b as f32;
            for ulps in [-2, 2] {
                let off = f32::from_bits(divided.to_bits().wrapping_add_signed(ulps));
                assert_eq!(off.floor() as u32, a / b, "{a} / {b}");
            }
        };
        for b in (1..2000).chain([4096, 8191, 32768, 65_537, MOST_ROWS]) {
            let whole = MOST_ROWS / b;
            for times in (1..=whole).step_by(100).chain([whole]) {
                check(times * b - 1, b);
                check(times * b, b);
            }
        }
        // Of the models' products the prefill's gate and up are widest, then the loop's.
        let widest = |t: &Tile| if t.epilogue == GemmEpilogue::GeGlu { 32768 } else { 8192 };
        for tile in TILES {
            let tiles = tile.tiles(MOST_ROWS, widest(tile));
            assert!(tiles < 1 << 20, "{tiles} of {}", tile.name);
        }
    }

    #[test]
    fn tiles_fit_an_sm() {
        for tile in TILES {
            assert!(tile.shared_bytes() <= 232_448, "{}", tile.name);
            let named =
                MEASURED.iter().all(|(e, _, _, name)| *name != tile.name || *e == tile.epilogue);
            assert!(named, "{}", tile.name);
            assert!(tile.bn % 8 == 0 && tile.bn <= 256 && tile.bm() <= 256, "{}", tile.name);
        }
    }
}
