//! Keys and values of an attention step → packed B operands that outlive the step: a later step
//! over the same buffers packs only the rows written since.

use std::sync::atomic::{AtomicUsize, Ordering};

use pirouette_model::program::{Attention, BufferId, Epilogue, KeyMask, Linear, Op};

use super::attention::AttentionPlan;
use super::operand::{Storage, bf16_bits, pack_columns};
use super::{CHUNK, Kernel, Lanes, PAIR};
use crate::executable::Context;

/// Packed keys and values of every (group, K/V head) of one pair of buffers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Store {
    start: usize,
    /// Most keys of a group, a multiple of 32.
    keys: usize,
    head_dim: usize,
    kv_heads: usize,
    storage: Storage,
}

impl Store {
    /// Words of one B panel of keys (16 keys).
    pub(super) fn key_panel(&self) -> usize {
        self.storage.chunks(self.head_dim) * CHUNK * CHUNK
    }

    /// Words of one B panel of values (16 columns of a head).
    pub(super) fn value_panel(&self) -> usize {
        self.storage.chunks(self.keys) * CHUNK * CHUNK
    }

    pub(super) fn key_words(&self) -> usize {
        self.keys / CHUNK * self.key_panel()
    }

    pub(super) fn words(&self) -> usize {
        self.key_words() + self.head_dim.div_ceil(CHUNK) * self.value_panel()
    }

    pub(super) fn keys_at(&self, group: usize, kv: usize) -> usize {
        self.start + (group * self.kv_heads + kv) * self.words()
    }

    fn values_at(&self, group: usize, kv: usize) -> usize {
        self.keys_at(group, kv) + self.key_words()
    }
}

/// Which buffers and columns a store was packed from.
type StoreKey = (BufferId, usize, BufferId, usize, usize, usize);

struct KnownStore {
    key: StoreKey,
    store: Store,
    /// First key row written since the last packing.
    stale_from: Option<usize>,
    /// Which rows the last packing closed up, and how many there were.
    packed: (KeyMask, usize),
}

/// The stores of a program, and what is stale in them as the plan is made step by step.
#[derive(Default)]
pub(crate) struct Stores {
    known: Vec<KnownStore>,
    next: usize,
}

impl Stores {
    pub(crate) fn words(&self) -> usize {
        self.next
    }

    /// The store of an attention step, and the first row it has to pack.
    pub(crate) fn store(&mut self, a: &Attention, kernel: Kernel) -> (Store, usize) {
        let key = (a.k.buffer, a.k.col, a.v.buffer, a.v.col, a.kv_heads, a.head_dim);
        let keys = a.k.count.next_multiple_of(PAIR);
        let known = self.known.iter_mut().find(|s| s.key == key && s.store.keys >= keys);
        if let Some(known) = known {
            let written = known.stale_from.take().unwrap_or(usize::MAX);
            let written = written.saturating_sub(a.k.first);
            let before = std::mem::replace(&mut known.packed, (a.mask, a.k.count));
            let from = match (before, a.mask) {
                (
                    (KeyMask::Suffix { prefix_rows: was, .. }, keys),
                    KeyMask::Suffix { prefix_rows, .. },
                ) if was == prefix_rows && keys == a.k.count => written,
                // The prefix is where it was; the suffix was not among the keys.
                ((KeyMask::Prefix, _), KeyMask::Suffix { prefix_rows, .. }) => {
                    written.min(prefix_rows)
                }
                _ => 0,
            };
            return (known.store, from);
        }
        // The cache is attended twice, first without the suffix: room for all rows at once.
        let room = a.k.stride.max(a.k.count).next_multiple_of(PAIR);
        let store = Store {
            start: self.next,
            keys: room,
            head_dim: a.head_dim,
            kv_heads: a.kv_heads,
            storage: kernel.storage,
        };
        self.next += a.groups * a.kv_heads * store.words();
        let packed = (a.mask, a.k.count);
        self.known.push(KnownStore { key, store, stale_from: None, packed });
        (store, 0)
    }

    /// Notes what a step writes.
    pub(crate) fn written(&mut self, op: &Op) {
        for buffer in op.writes() {
            let first = match op {
                Op::Linear(Linear { epilogue: Epilogue::Rope { k, v, .. }, .. })
                    if k.buffer == buffer || v.buffer == buffer =>
                {
                    k.first.min(v.first)
                }
                _ => 0,
            };
            for known in &mut self.known {
                if known.key.0 == buffer || known.key.2 == buffer {
                    let from = known.stale_from.unwrap_or(usize::MAX);
                    known.stale_from = Some(from.min(first));
                }
            }
        }
    }
}

/// First half of the step: packs stale keys and values, 32 keys a task.
pub(crate) fn pack(context: &Context<'_>, plan: &AttentionPlan, counter: &AtomicUsize) {
    let mut task = counter.fetch_add(1, Ordering::Relaxed);
    let mut before = 0;
    for &(group, _) in &context.rows[plan.rows].segments {
        let count = plan.key_count(context, group);
        let first = plan.first_stale(context, group).min(count) / PAIR;
        let tiles = count.div_ceil(PAIR) - first;
        while task < before + tiles * plan.kv_heads {
            let (kv, tile) = ((task - before) / tiles, (task - before) % tiles + first);
            pack_tile(context, plan, group, kv, tile * PAIR..((tile + 1) * PAIR).min(count));
            task = counter.fetch_add(1, Ordering::Relaxed);
        }
        before += tiles * plan.kv_heads;
    }
}

/// Packs up to 32 keys and their values.
fn pack_tile(
    context: &Context<'_>,
    plan: &AttentionPlan,
    group: usize,
    kv: usize,
    keys: std::ops::Range<usize>,
) {
    let (store, d) = (&plan.store, plan.head_dim);
    let mut rows: [[&[f32]; PAIR]; 2] = [[&[]; PAIR]; 2];
    for (n, key) in keys.clone().enumerate() {
        let row = plan.key_row(context, group, key);
        for (rows, place) in rows.iter_mut().zip([&plan.k, &plan.v]) {
            let at = place.at(group, row) + kv * d;
            // SAFETY: nobody writes the arena in this half of the step.
            rows[n] = unsafe { context.arena.read(at..at + d) };
        }
    }
    let panel = store.key_panel();
    let at = store.keys_at(group, kv) + keys.start / CHUNK * panel;
    // SAFETY: the two panels of these 32 keys belong to this task alone.
    let out: &mut [u32] = unsafe { context.stores.write(at..at + 2 * panel) };
    for (out, rows) in out.chunks_exact_mut(panel).zip(rows[0].chunks_exact(CHUNK)) {
        plan.kernel.isa.lanes(PackKeys { rows, storage: store.storage, out });
    }
    let chunks = PAIR / store.storage.per_chunk();
    for dims in 0..d.div_ceil(CHUNK) {
        let at = store.values_at(group, kv)
            + dims * store.value_panel()
            + keys.start / store.storage.per_chunk() * CHUNK * CHUNK;
        // SAFETY: the chunks of these 32 keys belong to this task alone.
        let out: &mut [u32] = unsafe { context.stores.write(at..at + chunks * CHUNK * CHUNK) };
        let columns = dims * CHUNK..((dims + 1) * CHUNK).min(d);
        let (rows, storage) = (&rows[1][..keys.len()], store.storage);
        plan.kernel.isa.lanes(PackValues { rows, columns, storage, out });
    }
}

/// Up to 16 keys → one panel.
struct PackKeys<'a> {
    rows: &'a [&'a [f32]],
    storage: Storage,
    out: &'a mut [u32],
}

impl Lanes for PackKeys<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let out = self.out;
        pack_columns(self.rows, self.storage, |chunk, column, words| {
            for (w, word) in words.iter().enumerate() {
                out[(chunk * CHUNK + w) * CHUNK + column] = *word;
            }
        });
    }
}

/// Up to 16 columns of up to 32 values → words of a panel; what is missing is zero.
struct PackValues<'a> {
    rows: &'a [&'a [f32]],
    columns: std::ops::Range<usize>,
    storage: Storage,
    out: &'a mut [u32],
}

impl Lanes for PackValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let row = |key: usize| -> [f32; CHUNK] {
            let mut values = [0.0; CHUNK];
            if let Some(row) = self.rows.get(key) {
                let row = &row[self.columns.clone()];
                match <&[f32; CHUNK]>::try_from(row) {
                    Ok(full) => values = *full,
                    Err(_) => values[..row.len()].copy_from_slice(row),
                }
            }
            values
        };
        for (w, out) in self.out.chunks_exact_mut(CHUNK).enumerate() {
            match self.storage {
                Storage::F32 => {
                    for (o, v) in out.iter_mut().zip(row(w)) {
                        *o = v.to_bits();
                    }
                }
                Storage::Bf16 => {
                    let (a, b) = (row(2 * w), row(2 * w + 1));
                    for ((o, a), b) in out.iter_mut().zip(a).zip(b) {
                        *o = bf16_bits(a) | bf16_bits(b) << 16;
                    }
                }
            }
        }
    }
}
