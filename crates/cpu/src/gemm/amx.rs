//! AMX micro-kernel: 32 rows × 32 columns in four tiles, bf16 pairs, f32 sums. Inline assembly: the
//! intrinsics are not stable.
//!
//! Tiles 0–3 hold the result (row half, column half), 4–5 A, 6–7 B, all 16 rows × 64 bytes.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::{CHUNK, Tile};

/// Whether the processor has AMX BF16 and the kernel grants its state to this process.
pub(super) fn is_available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| has_tiles() && permitted())
}

/// CPUID leaf 7, EDX bits 22 (AMX-BF16) and 24 (AMX-TILE).
fn has_tiles() -> bool {
    let leaf = __cpuid_count(7, 0);
    leaf.edx & (1 << 22) != 0 && leaf.edx & (1 << 24) != 0
}

/// Asks Linux for the tile data state (feature 18): once per process, it may be refused.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: arch_prctl takes two integers here and touches no memory of ours.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

/// The tile shapes, loaded by `ldtilecfg`.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Shapes>() == 64);

/// The thread's tiles are configured while this lives.
pub(super) struct Session(());

impl Session {
    /// # Panics
    /// If AMX is not available.
    pub(super) fn enter() -> Session {
        assert!(is_available(), "AMX is not available on this machine");
        let mut shapes = Shapes {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            bytes_per_row: [0; 16],
            rows: [0; 16],
        };
        shapes.bytes_per_row[..8].fill(64);
        shapes.rows[..8].fill(16);
        // SAFETY: available and permitted; the shapes are 8 full tiles of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &shapes, options(nostack, readonly)) };
        Session(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: configured in `enter` on this thread; nobody uses the tiles any more.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// One variant: load or clear the sums, go along K, store. `{a}`, `{b0}`, `{b1}` advance by one
/// chunk: 1 KB of a B panel, `{a_step}` bytes of the A panel. Each chunk fetches `{p_lines}` and
/// `{q_lines}` lines of the two runs ahead. `{t}` is free for use in all parts but the loop over K.
macro_rules! variant {
    ($name:ident: load $($load:literal)*; clear $($clear:literal)*;
     multiply $($multiply:literal)*; then $($then:literal)*; store $($store:literal)*) => {
        /// # Safety
        /// As for [`tile`].
        unsafe fn $name(t: &Tile) {
            let [p, q] = t.ahead;
            // SAFETY: reads and writes what the tile's shape says, the caller vouches for it; a
            // prefetch may name any address.
            unsafe {
                asm!(
                    "test {t:e}, {t:e}",
                    "jz 2f",
                    $($load,)*
                    "jmp 3f",
                    "2:",
                    $($clear,)*
                    "3:",
                    "test {n}, {n}",
                    "jz 9f",
                    "4:",
                    $($multiply,)*
                    "mov {t}, {p_lines}",
                    "5:",
                    "dec {t}",
                    "js 6f",
                    "prefetcht1 [{p}]",
                    "add {p}, 64",
                    "jmp 5b",
                    "6:",
                    $($then,)*
                    "mov {t}, {q_lines}",
                    "7:",
                    "dec {t}",
                    "js 8f",
                    "prefetcht1 [{q}]",
                    "add {q}, 64",
                    "jmp 7b",
                    "8:",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "add {a}, {a_step}",
                    "dec {n}",
                    "jnz 4b",
                    "9:",
                    $($store,)*
                    t = inout(reg) t.accumulate as usize => _,
                    c = in(reg) t.c,
                    stride = in(reg) t.c_stride * size_of::<f32>(),
                    row = in(reg) CHUNK * size_of::<u32>(),
                    a = inout(reg) t.a => _,
                    a_step = in(reg) t.a_stride * size_of::<u32>(),
                    b0 = inout(reg) t.b[0] => _,
                    b1 = inout(reg) t.b[1] => _,
                    n = inout(reg) t.chunks => _,
                    p = inout(reg) p.start => _,
                    p_lines = in(reg) p.lines_per_chunk(t.chunks),
                    q = inout(reg) q.start => _,
                    q_lines = in(reg) q.lines_per_chunk(t.chunks),
                    options(nostack),
                );
            }
        }
    };
}

// A passes by once per pair of panels: it is loaded without displacing B from the nearest cache.
variant!(two_by_two:
    load
        "lea {t}, [{c} + 8 * {stride}]" "lea {t}, [{t} + 8 * {stride}]"
        "tileloadd tmm0, [{c} + {stride}]" "tileloadd tmm1, [{c} + {stride} + 64]"
        "tileloadd tmm2, [{t} + {stride}]" "tileloadd tmm3, [{t} + {stride} + 64]";
    clear "tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3";
    multiply
        "tileloadd tmm6, [{b0} + {row}]"
        "tileloaddt1 tmm4, [{a} + {row}]"
        "tdpbf16ps tmm0, tmm4, tmm6"
        "tileloadd tmm7, [{b1} + {row}]"
        "tdpbf16ps tmm1, tmm4, tmm7";
    then
        "tileloaddt1 tmm5, [{a} + {row} + 1024]"
        "tdpbf16ps tmm2, tmm5, tmm6"
        "tdpbf16ps tmm3, tmm5, tmm7";
    store
        "lea {t}, [{c} + 8 * {stride}]" "lea {t}, [{t} + 8 * {stride}]"
        "tilestored [{c} + {stride}], tmm0" "tilestored [{c} + {stride} + 64], tmm1"
        "tilestored [{t} + {stride}], tmm2" "tilestored [{t} + {stride} + 64], tmm3");

variant!(two_by_one:
    load
        "lea {t}, [{c} + 8 * {stride}]" "lea {t}, [{t} + 8 * {stride}]"
        "tileloadd tmm0, [{c} + {stride}]" "tileloadd tmm2, [{t} + {stride}]";
    clear "tilezero tmm0" "tilezero tmm2";
    multiply
        "tileloadd tmm6, [{b0} + {row}]"
        "tileloadd tmm4, [{a} + {row}]"
        "tdpbf16ps tmm0, tmm4, tmm6";
    then
        "tileloadd tmm5, [{a} + {row} + 1024]"
        "tdpbf16ps tmm2, tmm5, tmm6";
    store
        "lea {t}, [{c} + 8 * {stride}]" "lea {t}, [{t} + 8 * {stride}]"
        "tilestored [{c} + {stride}], tmm0" "tilestored [{t} + {stride}], tmm2");

variant!(one_by_two:
    load "tileloadd tmm0, [{c} + {stride}]" "tileloadd tmm1, [{c} + {stride} + 64]";
    clear "tilezero tmm0" "tilezero tmm1";
    multiply
        "tileloadd tmm4, [{a} + {row}]"
        "tileloadd tmm6, [{b0} + {row}]"
        "tdpbf16ps tmm0, tmm4, tmm6";
    then
        "tileloadd tmm7, [{b1} + {row}]"
        "tdpbf16ps tmm1, tmm4, tmm7";
    store "tilestored [{c} + {stride}], tmm0" "tilestored [{c} + {stride} + 64], tmm1");

variant!(one_by_one:
    load "tileloadd tmm0, [{c} + {stride}]";
    clear "tilezero tmm0";
    multiply "tileloadd tmm4, [{a} + {row}]" "tileloadd tmm6, [{b0} + {row}]";
    then "tdpbf16ps tmm0, tmm4, tmm6";
    store "tilestored [{c} + {stride}], tmm0");

/// # Safety
/// As for [`super::TileFn`]; a [`Session`] is open on this thread.
pub(super) unsafe fn tile(t: &Tile) {
    assert!(t.rows <= 32, "{} rows in a tile of 32", t.rows);
    // SAFETY: passed on. The result and the A panel hold 16 or 32 rows (`granule` is 16).
    unsafe {
        match (t.rows > 16, t.b[1].is_null()) {
            (true, false) => two_by_two(t),
            (true, true) => two_by_one(t),
            (false, false) => one_by_two(t),
            (false, true) => one_by_one(t),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::ahead::Run;
    use super::*;

    /// Small whole numbers, whose sums are exact in any order.
    fn number(i: usize) -> f32 {
        (i * 7919 % 1009 % 13) as f32 - 6.0
    }

    fn word(at: usize) -> u32 {
        number(2 * at).to_bits() >> 16 | number(2 * at + 1).to_bits() & 0xffff_0000
    }

    /// One call of the kernel against the plain sum.
    fn check(rows: usize, chunks: usize, panels: usize, accumulate: bool, ahead: [Run; 2]) {
        let (height, stride) = (rows.next_multiple_of(16), 48);
        let a: Vec<u32> = (0..chunks * height * CHUNK).map(word).collect();
        let b: Vec<Vec<u32>> = (0..2)
            .map(|p| (0..chunks * CHUNK * CHUNK).map(|i| word(i + 17 * p + 5)).collect())
            .collect();
        let before: Vec<f32> = (0..height * stride).map(number).collect();
        let mut c = before.clone();
        let _session = Session::enter();
        let t = Tile {
            rows,
            chunks,
            a: a.as_ptr(),
            a_stride: height * CHUNK,
            b: [b[0].as_ptr(), if panels == 2 { b[1].as_ptr() } else { std::ptr::null() }],
            c: c.as_mut_ptr(),
            c_stride: stride,
            accumulate,
            ahead,
        };
        // SAFETY: all three are as large as the shape says.
        unsafe { tile(&t) };
        let [low, high] =
            [|w: u32| f32::from_bits(w << 16), |w: u32| f32::from_bits(w & 0xffff_0000)];
        for (r, got) in c.chunks_exact(stride).enumerate() {
            for (j, got) in got.iter().enumerate() {
                let start = before[r * stride + j];
                let mut want = start;
                if j < panels * CHUNK {
                    want = if accumulate { start } else { 0.0 };
                    for (chunk, w) in (0..chunks).flat_map(|c| (0..CHUNK).map(move |w| (c, w))) {
                        let a = a[(chunk * height + r) * CHUNK + w];
                        let b = b[j / CHUNK][(chunk * CHUNK + w) * CHUNK + j % CHUNK];
                        want += low(a) * low(b) + high(a) * high(b);
                    }
                }
                assert_eq!(*got, want, "row {r}, column {j} of {rows} × {chunks} × {panels}");
            }
        }
    }

    #[test]
    fn tiles_are_right_whatever_they_fetch_ahead() {
        if !is_available() {
            println!("skipped: this machine has no AMX BF16, or does not let us use it");
            return;
        }
        let words = vec![0u32; 300 * CHUNK];
        let beyond = Run { start: std::ptr::without_provenance(64), lines: 100 };
        let runs = [
            [Run::NONE; 2],
            [Run::share(&words, 0, 7), Run::NONE],
            [Run::NONE, Run::share(&words, 1, 2)],
            [Run::behind(&words, 4096), beyond],
        ];
        for rows in [1, 16, 17, 20, 32] {
            for chunks in [0, 1, 2, 5, 18] {
                for panels in [1, 2] {
                    for ahead in runs {
                        check(rows, chunks, panels, false, ahead);
                        check(rows, chunks, panels, true, ahead);
                    }
                }
            }
        }
    }
}
