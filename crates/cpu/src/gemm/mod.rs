//! Products of packed operands.
//!
//! Both operands are packed into 32-bit words: a word is a pair of bf16 neighbours along K, or one
//! f32. 16 words of one row (64 bytes) are a *chunk*. E4M3 numbers times powers of two are stored
//! as bf16, which holds them exactly.
//!
//! - A (activations): panels of up to `Kernel::rows` rows, `[panel][chunk][row][16]`.
//! - B (weights, keys, values): panels of 16 columns, `[panel][word][16 columns]`.
//!
//! AMX tiles and AVX-512 dot products read the same bytes. Every element of a product is one chain
//! of multiply-adds in order of K, whatever the tiling: results do not depend on the number of
//! threads, nor on which rows are computed together.

pub(crate) mod ahead;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod edges;
pub(crate) mod epilogue;
mod isa;
pub(crate) mod keys;
pub(crate) mod math;
pub(crate) mod operand;
mod plain;
pub(crate) mod product;

use ahead::Run;
pub use isa::Isa;
pub(crate) use isa::{Lanes, mul_add};
pub(crate) use operand::Storage;

/// Words of one row in a chunk, and columns of a B panel.
pub(crate) const CHUNK: usize = 16;
/// Columns of two B panels, which a tile takes together.
pub(crate) const PAIR: usize = 2 * CHUNK;

/// One call of a micro-kernel: `rows` × 16 or 32 elements of a product.
///
/// c[r][j] (+)= Σ over chunks of a[chunk][r][..] · b_j[chunk][..][..]
pub(crate) struct Tile {
    /// Rows, at most `Kernel::rows`.
    pub(crate) rows: usize,
    /// Chunks along K.
    pub(crate) chunks: usize,
    /// First chunk of the A panel.
    pub(crate) a: *const u32,
    /// Words from one chunk of the A panel to the next: 16 · the panel's row capacity.
    pub(crate) a_stride: usize,
    /// First chunk of each B panel; the second may be absent (null).
    pub(crate) b: [*const u32; 2],
    /// First element of the result; columns of the second panel follow those of the first.
    pub(crate) c: *mut f32,
    /// Elements from one row of the result to the next.
    pub(crate) c_stride: usize,
    /// Whether to add to what is there.
    pub(crate) accumulate: bool,
    /// What to fetch meanwhile.
    pub(crate) ahead: [Run; 2],
}

/// A micro-kernel.
///
/// # Safety
/// The pointers cover what the shape says (A panels and results hold `capacity(rows)` rows), the
/// instruction set is available, and for AMX the thread is inside an `amx::Session`.
pub(crate) type TileFn = unsafe fn(&Tile);

/// How far ahead tiles fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// Where there are several panels of rows: next to B, A of the next block of K.
    pub(crate) rows: bool,
    /// Where there is one, and B passes by once: so many bytes of each B panel.
    pub(crate) bytes: usize,
}

/// A micro-kernel and its geometry.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    /// Storage of both operands.
    pub(crate) storage: Storage,
    /// Most rows of a tile.
    pub(crate) rows: usize,
    /// Rows come in multiples of this in memory.
    pub(crate) granule: usize,
    /// Most chunks of K kept in the nearest caches at a time.
    pub(crate) chunks_per_block: usize,
    /// Most rows of a task.
    pub(crate) block_rows: usize,
    /// Most pairs of B panels of a task.
    pub(crate) block_pairs: usize,
    /// What the tiles fetch ahead; absent: nothing.
    pub(crate) ahead: Option<Ahead>,
    pub(crate) tile: TileFn,
    /// What the plain loops around it are compiled for.
    pub(crate) isa: Isa,
}

impl Kernel {
    /// The best kernel for operands stored this way, no better than `isa`.
    pub(crate) fn choose(isa: Isa, storage: Storage) -> Kernel {
        let plain = |rows, tile| Kernel {
            storage,
            rows,
            granule: 1,
            chunks_per_block: 16,
            block_rows: 16 * rows,
            block_pairs: 8,
            ahead: None,
            tile,
            isa,
        };
        match (isa, storage) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx, Storage::Bf16) => Kernel {
                granule: 16,
                // A pair of B takes 32 KB of the nearest cache; A of all rows 416 KB of the
                // second, as much again for what is fetched ahead, sums 624 KB.
                chunks_per_block: 16,
                block_rows: 13 * 32,
                block_pairs: 12,
                ahead: Some(Ahead { rows: true, bytes: 4096 }),
                ..plain(32, amx::tile as TileFn)
            },
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, Storage::Bf16) => {
                Kernel { chunks_per_block: 32, ..plain(14, avx512::tile_bf16 as TileFn) }
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Amx | Isa::Avx512Bf16 | Isa::Avx512, Storage::F32) => {
                Kernel { chunks_per_block: 32, ..plain(14, avx512::tile_f32 as TileFn) }
            }
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512, Storage::Bf16) => plain(12, avx512::tile_widened as TileFn),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, Storage::F32) => plain(6, avx2::tile_f32 as TileFn),
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx2, Storage::Bf16) => plain(4, avx2::tile_bf16 as TileFn),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, Storage::F32) => plain(6, plain::neon_f32 as TileFn),
            #[cfg(target_arch = "aarch64")]
            (Isa::Neon, Storage::Bf16) => plain(4, plain::neon_bf16 as TileFn),
            (_, Storage::F32) => plain(4, plain::portable_f32 as TileFn),
            (_, Storage::Bf16) => plain(4, plain::portable_bf16 as TileFn),
        }
    }

    /// Rows that `rows` rows take in memory.
    pub(crate) fn capacity(&self, rows: usize) -> usize {
        rows.next_multiple_of(self.granule)
    }

    /// Chunks from one panel of A to the next: some more where panels that are read together would
    /// share the sets of a cache.
    pub(crate) fn panel_chunks(&self, chunks: usize) -> usize {
        const WAY_CHUNKS: usize = 64;
        let aligned = self.ahead.is_some() && chunks.is_multiple_of(WAY_CHUNKS);
        if aligned { chunks + self.chunks_per_block } else { chunks }
    }

    /// Rows per panel when `rows` rows are cut into as few and as equal panels as possible.
    pub(crate) fn panel_rows(&self, rows: usize) -> usize {
        let panels = rows.div_ceil(self.rows).max(1);
        self.capacity(rows.div_ceil(panels).max(1))
    }
}

/// What a worker's thread needs for the time of a run.
pub(crate) struct Session {
    #[cfg(target_arch = "x86_64")]
    _amx: Option<amx::Session>,
}

impl Session {
    pub(crate) fn enter(isa: Isa) -> Session {
        let _ = isa;
        Session {
            #[cfg(target_arch = "x86_64")]
            _amx: (isa == Isa::Amx).then(amx::Session::enter),
        }
    }
}
