//! LeRobot's resize: torch's bilinear interpolation without antialiasing, in float32, on black.

use super::fitted_size;

/// Scales an RGB image of floats in [0, 1] of `from` (height, width) to fit into `to` and centres
/// it on zeros; an odd pixel of padding goes to the bottom or right. `None` if a side would
/// vanish or `pixels` is not `height · width · 3` long.
pub fn resize_with_pad(
    pixels: &[f32],
    from: (usize, usize),
    to: (usize, usize),
) -> Option<Vec<f32>> {
    let (height, width) = from;
    if height.checked_mul(width)?.checked_mul(3)? != pixels.len() {
        return None;
    }
    let (rows, columns) = fitted_size(from, to)?;
    let (top, left) = ((to.0 - rows) / 2, (to.1 - columns) / 2);
    let mut canvas = vec![0.0; to.0.checked_mul(to.1)?.checked_mul(3)?];
    let across: Vec<Between> = (0..columns).map(|x| Between::new(x, width, columns)).collect();
    for y in 0..rows {
        let down = Between::new(y, height, rows);
        let upper = &pixels[down.low * width * 3..][..width * 3];
        let lower = &pixels[down.high * width * 3..][..width * 3];
        let line = &mut canvas[((top + y) * to.1 + left) * 3..][..columns * 3];
        for (pixel, across) in line.chunks_exact_mut(3).zip(&across) {
            for (c, value) in pixel.iter_mut().enumerate() {
                let (a, b) = (across.low * 3 + c, across.high * 3 + c);
                let above = across.mix(upper[a], upper[b]);
                *value = down.mix(above, across.mix(lower[a], lower[b])).clamp(0.0, 1.0);
            }
        }
    }
    Some(canvas)
}

/// Scales an RGB image of bytes of `from` (height, width) to exactly `to`, whatever becomes of its
/// proportions: what LeRobot's policy server does to a camera's image before anything else.
/// `None` if a side is 0 or `pixels` is not `height · width · 3` long.
pub fn stretch(pixels: &[u8], from: (usize, usize), to: (usize, usize)) -> Option<Vec<u8>> {
    let (height, width) = from;
    let bytes = to.0.checked_mul(to.1)?.checked_mul(3)?;
    if height.checked_mul(width)?.checked_mul(3)? != pixels.len() || pixels.is_empty() {
        return None;
    }
    let mut out = Vec::with_capacity(bytes);
    let across: Vec<Between> = (0..to.1).map(|x| Between::new(x, width, to.1)).collect();
    for y in 0..to.0 {
        let down = Between::new(y, height, to.0);
        let row = |y: usize| &pixels[y * width * 3..][..width * 3];
        let (upper, lower) = (row(down.low), row(down.high));
        for across in &across {
            for c in 0..3 {
                let (a, b) = (across.low * 3 + c, across.high * 3 + c);
                let mixed = |line: &[u8]| across.mix(line[a].into(), line[b].into());
                // Rounded to nearest; the cast saturates.
                out.push((down.mix(mixed(upper), mixed(lower)) + 0.5) as u8);
            }
        }
    }
    (out.len() == bytes && bytes > 0).then_some(out)
}

/// Between which two input positions an output position lies, and how near the second.
struct Between {
    low: usize,
    high: usize,
    share: f32,
}

impl Between {
    fn new(position: usize, input: usize, output: usize) -> Between {
        let scale = input as f32 / output as f32;
        let source = ((position as f32 + 0.5) * scale - 0.5).max(0.0);
        let low = (source as usize).min(input - 1);
        Between { low, high: (low + 1).min(input - 1), share: (source - low as f32).min(1.0) }
    }

    fn mix(&self, low: f32, high: f32) -> f32 {
        (1.0 - self.share) * low + self.share * high
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_picks_and_mixes_without_a_filter() {
        // 4 → 1 pixel: torch reads only the two in the middle.
        let line: Vec<f32> = [0.0, 0.25, 0.75, 1.0].iter().flat_map(|&v| [v; 3]).collect();
        let four: Vec<f32> = (0..4).flat_map(|_| line.clone()).collect();
        assert_eq!(resize_with_pad(&four, (4, 4), (1, 1)).unwrap(), [0.5; 3]);
        assert!(resize_with_pad(&four, (4, 4), (0, 0)).is_none());
        assert!(resize_with_pad(&four, (5, 4), (1, 1)).is_none());
    }

    #[test]
    fn stretching_fills_the_whole_and_keeps_no_proportions() {
        // A row of two pixels, twice as wide: half-pixel centres at -0.25, 0.25, 0.75, 1.25.
        let row = [0, 0, 0, 100, 200, 255];
        let wide = [0, 0, 0, 25, 50, 64, 75, 150, 191, 100, 200, 255];
        assert_eq!(stretch(&row, (1, 2), (1, 4)).unwrap(), wide);
        assert_eq!(stretch(&row, (1, 2), (2, 4)).unwrap(), [wide, wide].concat());
        assert_eq!(stretch(&row, (2, 1), (1, 1)).unwrap(), [50, 100, 128]);
        assert_eq!(stretch(&row, (1, 2), (1, 2)).unwrap(), row);
        assert!(stretch(&row, (2, 2), (1, 1)).is_none());
        assert!(stretch(&row, (1, 2), (0, 1)).is_none());
        assert!(stretch(&[], (0, 2), (1, 1)).is_none());
    }
}
