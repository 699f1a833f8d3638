//! What the next tiles of a worker will read → runs of cache lines that its present tiles fetch.

use super::CHUNK;

/// Neighbouring cache lines to bring near. They are only ever fetched, never read, so they need
/// not lie inside anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) start: *const u32,
    /// Lines of 64 bytes.
    pub(crate) lines: usize,
}

impl Run {
    /// Nothing.
    pub(crate) const NONE: Run = Run { start: std::ptr::null(), lines: 0 };

    /// Share `index` of `count` of some words.
    pub(crate) fn share(words: &[u32], index: usize, count: usize) -> Run {
        let lines = words.len() / CHUNK;
        let each = lines.div_ceil(count.max(1));
        let first = (index * each).min(lines);
        Run { start: words[first * CHUNK..].as_ptr(), lines: each.min(lines - first) }
    }

    /// What call `index` of `count` fetches of the two panels that come after: the first half of
    /// the calls the first panel, the second half the other one.
    pub(crate) fn of_pair(panels: [&[u32]; 2], index: usize, count: usize) -> Run {
        let half = (count / 2).max(1);
        match panels.get(index / half) {
            Some(panel) => Run::share(panel, index % half, half),
            None => Run::NONE,
        }
    }

    /// As many lines as `words`, `distance` bytes behind them: the same place of a stream, later.
    pub(crate) fn behind(words: &[u32], distance: usize) -> Run {
        Run { start: words.as_ptr().wrapping_byte_add(distance), lines: words.len() / CHUNK }
    }

    /// Lines to fetch with each of `chunks` chunks.
    pub(crate) fn lines_per_chunk(&self, chunks: usize) -> usize {
        self.lines.div_ceil(chunks.max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lines of `words` that runs fetch, how often each.
    fn fetched(words: &[u32], runs: &[Run]) -> Vec<usize> {
        let mut times = vec![0; words.len() / CHUNK];
        for run in runs.iter().filter(|r| r.lines > 0) {
            let Some(at) = (run.start as usize).checked_sub(words.as_ptr() as usize) else {
                continue;
            };
            let first = at / 64;
            for time in times.iter_mut().skip(first).take(run.lines) {
                *time += 1;
            }
        }
        times
    }

    #[test]
    fn shares_fetch_every_line_once() {
        for (lines, count) in [(1, 1), (256, 8), (256, 7), (512, 12), (5, 9), (0, 3)] {
            let words = vec![0; lines * CHUNK];
            let runs: Vec<Run> = (0..count).map(|i| Run::share(&words, i, count)).collect();
            assert!(fetched(&words, &runs).iter().all(|t| *t == 1), "{lines} lines, {count}");
            assert_eq!(runs.iter().map(|r| r.lines).sum::<usize>(), lines);
        }
    }

    #[test]
    fn the_calls_of_a_pair_fetch_both_panels_of_the_next() {
        for count in 2..30 {
            let panels = [vec![0; 256 * CHUNK], vec![0; 256 * CHUNK]];
            let pair = [&panels[0][..], &panels[1][..]];
            let runs: Vec<Run> = (0..count).map(|i| Run::of_pair(pair, i, count)).collect();
            assert_eq!(runs.iter().map(|r| r.lines).sum::<usize>(), 512, "{count} calls");
            for panel in pair {
                let runs: Vec<Run> = runs
                    .iter()
                    .copied()
                    .filter(|r| panel.as_ptr_range().contains(&r.start))
                    .collect();
                assert!(fetched(panel, &runs).iter().all(|t| *t == 1), "{count} calls");
            }
        }
    }

    #[test]
    fn every_chunk_has_its_part_of_a_run() {
        let words = vec![0; 100 * CHUNK];
        let run = Run::share(&words, 0, 1);
        for chunks in 1..200 {
            let fetched = run.lines_per_chunk(chunks) * chunks;
            assert!((100..100 + chunks).contains(&fetched), "{chunks} chunks: {fetched}");
        }
        assert_eq!(Run::NONE.lines_per_chunk(16), 0);
    }
}
