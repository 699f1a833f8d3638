//! A corpus → inputs near it: flipped bits, odd numbers, cuts, copies, splices.

/// Values where lengths and counts tend to break.
const ODD: [u64; 10] = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    0x7FFF_FFFF_FFFF_FFFF,
    u64::MAX,
];

/// A reproducible source of mutations.
pub struct Mutator {
    state: u64,
}

impl Mutator {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Mutator { state: seed | 1 }
    }

    /// A number below `n`; 0 for none.
    pub fn below(&mut self, n: usize) -> usize {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let high = (self.state >> 33) as usize;
        if n == 0 { 0 } else { high % n }
    }

    /// One to eight mutations of a file of the corpus.
    pub fn mutate(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut out = corpus[self.below(corpus.len())].clone();
        for _ in 0..1 + self.below(8) {
            self.step(&mut out, corpus);
        }
        out
    }

    fn step(&mut self, out: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let at = self.below(out.len());
        match self.below(7) {
            0 if !out.is_empty() => out[at] ^= 1 << self.below(8),
            1 if !out.is_empty() => out[at] = self.below(256) as u8,
            2 => out.truncate(at),
            3 => {
                let odd = ODD[self.below(ODD.len())];
                let width = 1 << self.below(4);
                let bytes = if self.below(2) == 0 { odd.to_le_bytes() } else { odd.to_be_bytes() };
                for (o, b) in out.iter_mut().skip(at).zip(&bytes[..width]) {
                    *o = *b;
                }
            }
            4 => {
                let bytes: Vec<u8> =
                    (0..1 + self.below(16)).map(|_| self.below(256) as u8).collect();
                out.splice(at..at, bytes);
            }
            5 => {
                let end = (at + 1 + self.below(64)).min(out.len());
                let part = out[at..end].to_vec();
                let to = self.below(out.len());
                out.splice(to..to, part);
            }
            _ => {
                let other = &corpus[self.below(corpus.len())];
                let from = self.below(other.len());
                let end = (from + self.below(256)).min(other.len());
                let stop = (at + self.below(64)).min(out.len());
                out.splice(at..stop, other[from..end].iter().copied());
            }
        }
    }
}
