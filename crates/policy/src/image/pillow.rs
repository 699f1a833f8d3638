//! Pillow's 8-bit bilinear resize (a triangle filter, antialiased), bit for bit, on a black
//! square. Horizontal pass, then vertical, with 8-bit pixels between them: Pillow up to 12, as in
//! openpi's lock file (11.2.1). Pillow 13 shrinks images over twice as tall as wide vertically
//! first, which moves some of their pixels by one level.

use super::fitted_size;

/// Fraction bits of Pillow's fixed-point weights.
const BITS: u32 = 22;
/// One half, added before the shift.
const HALF: i32 = 1 << (BITS - 1);

/// Scales an RGB image of `from` (height, width) to fit into `to` and centres it on black; an odd
/// pixel of padding goes to the bottom or right. `None` if a side would vanish or `pixels` is not
/// `height · width · 3` long. The same size is returned as it is.
pub fn resize_with_pad(pixels: &[u8], from: (usize, usize), to: (usize, usize)) -> Option<Vec<u8>> {
    let (height, width) = from;
    if height.checked_mul(width)?.checked_mul(3)? != pixels.len() {
        return None;
    }
    if from == to {
        return Some(pixels.to_vec());
    }
    let (rows, columns) = fitted_size(from, to)?;
    let squeezed;
    let mut image = pixels;
    if columns != width {
        squeezed = horizontal(image, width, &Taps::new(width, columns));
        image = &squeezed;
    }
    let (top, left) = ((to.0 - rows) / 2, (to.1 - columns) / 2);
    let mut canvas = vec![0; to.0.checked_mul(to.1)?.checked_mul(3)?];
    let target = canvas.chunks_exact_mut(to.1 * 3).skip(top).take(rows);
    let inner = left * 3..(left + columns) * 3;
    if rows == height {
        for (line, source) in target.zip(image.chunks_exact(columns * 3)) {
            line[inner.clone()].copy_from_slice(source);
        }
        return Some(canvas);
    }
    let taps = Taps::new(height, rows);
    let mut sums = vec![0; columns * 3];
    for (line, (first, weights)) in target.zip(taps.iter()) {
        vertical(image, columns * 3, first, weights, &mut sums);
        for (pixel, sum) in line[inner.clone()].iter_mut().zip(&sums) {
            *pixel = to_byte(*sum);
        }
    }
    Some(canvas)
}

/// For each output position: the first input position it reads and the weights from there on.
struct Taps {
    first: Vec<usize>,
    /// End of each position's weights in `weights`.
    end: Vec<usize>,
    weights: Vec<i32>,
}

impl Taps {
    fn new(input: usize, output: usize) -> Taps {
        let scale = input as f64 / output as f64;
        let support = scale.max(1.0);
        let inverse = 1.0 / support;
        let mut taps = Taps { first: Vec::new(), end: Vec::new(), weights: Vec::new() };
        let mut exact = Vec::new();
        for i in 0..output {
            let centre = (i as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let last = ((centre + support + 0.5) as usize).min(input);
            exact.clear();
            exact.extend((first..last).map(|x| {
                let distance = ((x as f64 - centre + 0.5) * inverse).abs();
                if distance < 1.0 { 1.0 - distance } else { 0.0 }
            }));
            let total: f64 = exact.iter().sum();
            let one = f64::from(1u32 << BITS);
            let fixed = |w: &f64| {
                let w = if total == 0.0 { *w } else { w / total };
                (0.5 + w * one) as i32
            };
            taps.first.push(first);
            taps.weights.extend(exact.iter().map(fixed));
            taps.end.push(taps.weights.len());
        }
        taps
    }

    fn iter(&self) -> impl Iterator<Item = (usize, &[i32])> {
        let starts = std::iter::once(0).chain(self.end.iter().copied());
        let spans = starts.zip(&self.end).map(|(start, &end)| &self.weights[start..end]);
        self.first.iter().copied().zip(spans)
    }
}

fn horizontal(image: &[u8], width: usize, taps: &Taps) -> Vec<u8> {
    let columns = taps.first.len();
    let mut out = vec![0; image.len() / width * columns];
    let lines = image.chunks_exact(width * 3).zip(out.chunks_exact_mut(columns * 3));
    for (source, line) in lines {
        let (source, line) = (source.as_chunks::<3>().0, line.as_chunks_mut::<3>().0);
        for (pixel, (first, weights)) in line.iter_mut().zip(taps.iter()) {
            let mut sums = [HALF; 3];
            for ([r, g, b], &weight) in source[first..].iter().zip(weights) {
                sums[0] += weight * i32::from(*r);
                sums[1] += weight * i32::from(*g);
                sums[2] += weight * i32::from(*b);
            }
            *pixel = sums.map(to_byte);
        }
    }
    out
}

/// One output line before its rounding: whole input lines, weighted.
fn vertical(image: &[u8], line: usize, first: usize, weights: &[i32], sums: &mut [i32]) {
    sums.fill(HALF);
    let lines = image.chunks_exact(line).skip(first);
    for (source, &weight) in lines.zip(weights) {
        for (sum, &value) in sums.iter_mut().zip(source) {
            *sum += weight * i32::from(value);
        }
    }
}

fn to_byte(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_image_stays_flat_and_is_framed_in_black() {
        let out = resize_with_pad(&[200; 30 * 20 * 3], (30, 20), (12, 12)).unwrap();
        let line: Vec<u8> = out[..12 * 3].iter().copied().step_by(3).collect();
        assert_eq!(line, [0, 0, 200, 200, 200, 200, 200, 200, 200, 200, 0, 0]);
    }

    #[test]
    fn the_largest_side_does_not_overflow() {
        let side = super::super::MAX_SIDE;
        let out = resize_with_pad(&vec![255; side * 3], (side, 1), (4, 4));
        assert!(out.is_none());
        let out = resize_with_pad(&vec![255; side * 2 * 3], (side, 2), (side / 2, 1)).unwrap();
        assert!(out.iter().all(|&v| v == 255));
        let taps = Taps::new(side, 1);
        let (_, weights) = taps.iter().next().unwrap();
        assert!(weights.iter().map(|&w| i64::from(w) * 255).sum::<i64>() < i64::from(i32::MAX));
    }

    #[test]
    fn a_wrong_length_is_refused() {
        assert!(resize_with_pad(&[0; 5], (2, 2), (4, 4)).is_none());
        assert!(resize_with_pad(&[], (usize::MAX, 3), (4, 4)).is_none());
    }
}
