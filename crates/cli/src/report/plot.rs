//! Series and bars → inline SVG, coloured by the page's style sheet.

use std::fmt::Write;

use super::html::escape;
use crate::profile::milliseconds;

/// A picture.
#[derive(Clone, Debug, PartialEq)]
pub enum Plot {
    /// Values over the batch size, which grows by factors.
    Lines(Lines),
    /// Horizontal bars.
    Bars(Bars),
}

/// Values over the batch size.
#[derive(Clone, Debug, PartialEq)]
pub struct Lines {
    /// What is shown, with the unit.
    pub title: String,
    /// Name and points of each line.
    pub series: Vec<(String, Vec<(f64, f64)>)>,
}

/// Horizontal bars.
#[derive(Clone, Debug, PartialEq)]
pub struct Bars {
    /// What is shown, with the unit.
    pub title: String,
    /// What a mark across a bar is, if there are any.
    pub mark: Option<String>,
    /// The bars.
    pub bars: Vec<Bar>,
}

/// One bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// Its name.
    pub label: String,
    /// Its length.
    pub value: f64,
    /// Where the mark is.
    pub mark: Option<f64>,
}

const WIDTH: f64 = 720.0;

/// Length of the piece of a line that stands before its name.
const SWATCH: f64 = 22.0;

/// Of lines from the fifth on, whose colours are those of the first four again.
const DASHES: [&str; 4] =
    ["", " stroke-dasharray=\"7 4\"", " stroke-dasharray=\"2 3\"", " stroke-dasharray=\"9 3 2 3\""];

impl Plot {
    /// The picture.
    pub fn svg(&self) -> String {
        match self {
            Plot::Lines(lines) => lines.svg(),
            Plot::Bars(bars) => bars.svg(),
        }
    }
}

impl Lines {
    fn svg(&self) -> String {
        let (left, right, bottom) = (56.0, 16.0, 36.0);
        let (legend, rows) = self.legend(left);
        let top = 26.0 + 18.0 * rows as f64;
        let height = 236.0 + top;
        let points = || self.series.iter().flat_map(|(_, p)| p.iter().copied());
        let most = points().map(|p| p.1).fold(0.0, f64::max);
        let (ticks, end) = axis(most);
        let mut xs: Vec<f64> = points().map(|p| p.0).filter(|&x| x > 0.0).collect();
        xs.sort_by(f64::total_cmp);
        xs.dedup();
        let (low, high) = (xs.first().copied().unwrap_or(1.0), xs.last().copied().unwrap_or(1.0));
        let span = (high / low).log2().max(1e-9);
        let x = |v: f64| left + (v / low).log2() / span * (WIDTH - left - right);
        let y = |v: f64| height - bottom - v / end * (height - top - bottom);
        let mut out = open(height, &self.title);
        for tick in ticks {
            let at = y(tick);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>",
                WIDTH - right
            );
            text(&mut out, "tick", "end", left - 8.0, at + 4.0, &short(tick));
        }
        for &v in &xs {
            text(&mut out, "tick", "middle", x(v), height - bottom + 18.0, &short(v));
        }
        text(&mut out, "tick", "end", WIDTH - right, height - 4.0, "batch");
        for (i, (name, points)) in self.series.iter().enumerate() {
            let (colour, dash) = (i % 4, DASHES[i / 4 % 4]);
            let path: Vec<String> =
                points.iter().map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1))).collect();
            let _ = write!(
                out,
                "<polyline class=\"line s{colour}\"{dash} points=\"{}\"/>",
                path.join(" ")
            );
            for p in points {
                let (cx, cy) = (x(p.0), y(p.1));
                let _ = write!(
                    out,
                    "<circle class=\"dot s{colour}\" cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"3.5\"/>"
                );
            }
            let (at, y) = legend[i];
            let _ = write!(
                out,
                "<line class=\"line s{colour}\"{dash} x1=\"{at:.1}\" x2=\"{:.1}\" \
                 y1=\"{y:.1}\" y2=\"{y:.1}\"/>",
                at + SWATCH
            );
            text(&mut out, "label", "start", at + SWATCH + 6.0, y + 4.5, name);
        }
        out + "</svg>"
    }

    /// Where each name of the legend goes, and the rows they take.
    fn legend(&self, left: f64) -> (Vec<(f64, f64)>, usize) {
        let (mut x, mut row) = (left, 0);
        let place = |(name, _): &(String, _)| {
            let width = SWATCH + 6.0 + 6.6 * name.chars().count() as f64;
            if x > left && x + width > WIDTH {
                (x, row) = (left, row + 1);
            }
            let at = (x, 26.5 + 18.0 * row as f64);
            x += width + 16.0;
            at
        };
        let places = self.series.iter().map(place).collect();
        (places, row + 1)
    }
}

impl Bars {
    fn svg(&self) -> String {
        let (row, top, right) = (26.0, 30.0, 70.0);
        let longest = self.bars.iter().map(|b| b.label.chars().count()).max().unwrap_or(0);
        let left = (16.0 + 6.8 * longest as f64).min(300.0);
        let foot = if self.mark.is_some() { 24.0 } else { 4.0 };
        let height = top + row * self.bars.len() as f64 + foot;
        let longest = |b: &Bar| b.value.max(b.mark.unwrap_or(0.0));
        let most = self.bars.iter().map(longest).fold(1e-12, f64::max);
        let x = |v: f64| (v / most).clamp(0.0, 1.0) * (WIDTH - left - right);
        let mut out = open(height, &self.title);
        for (i, bar) in self.bars.iter().enumerate() {
            let y = top + row * i as f64;
            text(&mut out, "label", "end", left - 10.0, y + 15.0, &bar.label);
            let _ = write!(
                out,
                "<rect class=\"s0\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"16\"/>",
                y + 3.0,
                x(bar.value).max(1.0)
            );
            if let Some(mark) = bar.mark {
                let at = left + x(mark);
                let _ = write!(
                    out,
                    "<line class=\"mark\" x1=\"{at:.1}\" x2=\"{at:.1}\" \
                     y1=\"{y:.1}\" y2=\"{:.1}\"/>",
                    y + 22.0
                );
            }
            let end = left + x(bar.value.max(bar.mark.unwrap_or(0.0))) + 8.0;
            text(&mut out, "value", "start", end, y + 15.0, &milliseconds(bar.value));
        }
        if let Some(mark) = &self.mark {
            let y = height - 8.0;
            let _ = write!(
                out,
                "<line class=\"mark\" x1=\"{left:.1}\" x2=\"{left:.1}\" \
                 y1=\"{:.1}\" y2=\"{:.1}\"/>",
                y - 11.0,
                y + 3.0
            );
            text(&mut out, "tick", "start", left + 8.0, y, mark);
        }
        out + "</svg>"
    }
}

fn open(height: f64, title: &str) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">\
         <text class=\"head\" x=\"0\" y=\"14\">{title}</text>"
    )
}

fn text(out: &mut String, class: &str, anchor: &str, x: f64, y: f64, value: &str) {
    let value = escape(value);
    let _ = write!(
        out,
        "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{value}</text>"
    );
}

/// Round ticks from zero, and the end of the axis, at or above the largest value.
fn axis(most: f64) -> (Vec<f64>, f64) {
    let most = if most > 0.0 && most.is_finite() { most } else { 1.0 };
    let power = 10f64.powf((most / 4.0).log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * power);
    let step = steps.into_iter().find(|s| most / s <= 4.0).unwrap_or(10.0 * power);
    let count = (most / step).ceil() as usize;
    ((0..=count).map(|i| i as f64 * step).collect(), count as f64 * step)
}

fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_above_the_largest_value_in_a_few_round_steps() {
        for most in [0.03, 0.9, 1.0, 4.1, 97.6, 182.4, 1e4] {
            let (ticks, end) = axis(most);
            assert!(end >= most && end <= 2.0 * most && (2..=6).contains(&ticks.len()), "{most}");
            assert_eq!(ticks[0], 0.0);
        }
        assert_eq!(axis(0.0).1, 1.0);
        assert_eq!([short(0.25), short(20.0), short(0.0)], ["0.25", "20", "0"]);
    }

    #[test]
    fn a_long_legend_stays_in_the_picture_and_no_two_lines_look_alike() {
        let name = |i| format!("pi05 bf16 on cuda:{i} NVIDIA H100 80GB HBM3");
        let series: Vec<_> = (0..9).map(|i| (name(i), vec![(1.0, 2.0), (2.0, 3.0)])).collect();
        let lines = Lines { title: "t".into(), series };
        let (places, rows) = lines.legend(56.0);
        assert_eq!((places.len(), rows), (9, 5));
        for ((x, y), (name, _)) in places.iter().zip(&lines.series) {
            assert!(x + SWATCH + 6.0 + 6.6 * name.len() as f64 <= WIDTH, "{name} at {x}");
            // The largest value is below the last row.
            assert!(y + 4.5 < 26.0 + 18.0 * rows as f64);
        }
        let svg = Plot::Lines(lines).svg();
        let mut looks: Vec<&str> =
            svg.split("<polyline ").skip(1).filter_map(|p| p.split(" points").next()).collect();
        looks.sort();
        looks.dedup();
        assert_eq!(looks.len(), 9, "{looks:?}");
    }

    #[test]
    fn odd_numbers_still_make_a_picture() {
        let bars = |value| {
            let bar = Bar { label: "a<b".into(), value, mark: Some(1.0) };
            Plot::Bars(Bars { title: "t".into(), mark: None, bars: vec![bar] }).svg()
        };
        assert!(bars(0.0).contains("a&lt;b"));
        let empty = Plot::Lines(Lines { title: "t".into(), series: vec![] }).svg();
        let one = vec![("x".to_string(), vec![(4.0, 2.0)])];
        let one = Plot::Lines(Lines { title: "t".into(), series: one }).svg();
        for svg in [bars(0.0), bars(3.0), empty, one] {
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
