//! Plots as SVG that stands inside a page: colours are the page's (`--c0` to `--c9`, `currentColor`), so it follows light and dark.

use std::fmt::Write;

use super::html::escape;

/// Size of a plot, in its own units; a page scales it.
const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 340.0;

/// Room around the axes: left, right, top, bottom.
const MARGIN: [f64; 4] = [58.0, 14.0, 14.0, 44.0];

/// Colours there are.
const COLOURS: usize = 10;

/// An axis.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis<'a> {
    pub(super) label: &'a str,
    /// Equal distances are equal ratios.
    pub(super) log: bool,
    /// Whether it starts at 0, if it is not logarithmic.
    pub(super) from_zero: bool,
}

/// Points of one colour.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
    /// Names of points, shown beside them; none if empty.
    pub(super) labels: Vec<String>,
    /// Whether points are joined.
    pub(super) line: bool,
}

/// From values to places.
struct Scale {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Scale {
    fn new(axis: Axis<'_>, values: impl Iterator<Item = f64>, (from, to): (f64, f64)) -> Self {
        let good = |v: &f64| v.is_finite() && (!axis.log || *v > 0.0);
        let (mut low, mut high) = values
            .filter(good)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (v.min(l), v.max(h)));
        if low > high {
            (low, high) = (1.0, 2.0);
        }
        if axis.from_zero && !axis.log {
            (low, high) = (low.min(0.0), high.max(0.0));
        }
        if axis.log {
            (low, high) = (low / 1.15, high * 1.15);
        } else {
            let pad = (high - low).max(1e-9) * 0.05;
            high += pad;
            if low < 0.0 || !axis.from_zero {
                low -= pad;
            }
        }
        Self { low, high, log: axis.log, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + share * (self.to - self.from)
    }

    /// Round values in its range.
    fn ticks(&self) -> Vec<f64> {
        let inside = |v: &f64| *v >= self.low && *v <= self.high;
        if self.log {
            let decades = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
            let all = |steps: &[f64]| -> Vec<f64> {
                let of = |d: i32| steps.iter().map(move |s| s * 10f64.powi(d));
                decades.clone().flat_map(of).filter(inside).collect()
            };
            let steps: [&[f64]; 3] =
                [&[1.0], &[1.0, 2.0, 5.0], &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]];
            return steps
                .iter()
                .map(|s| all(s))
                .find(|ticks| ticks.len() >= 3)
                .unwrap_or_else(|| all(steps[2]));
        }
        let rough = (self.high - self.low) / 5.0;
        let unit = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|s| s * unit).find(|s| *s >= rough);
        let step = step.unwrap_or(10.0 * unit);
        let first = (self.low / step).ceil() as i64;
        (first..first + 12).map(|i| i as f64 * step).filter(inside).collect()
    }
}

/// A number as short as its digits allow.
pub(super) fn short(value: f64) -> String {
    let text = match value.abs() {
        v if v >= 100.0 || v == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        v if v >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.0e}"),
    };
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

fn begin(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\"><title>{title}</title>"
    )
}

/// Points and lines on two axes, with a legend where there are several series.
pub(super) fn chart(title: &str, x: Axis<'_>, y: Axis<'_>, series: &[Series]) -> String {
    let [left, right, top, bottom] = MARGIN;
    let named = series.len() > 1;
    let height = HEIGHT + if named { 18.0 * series.len().div_ceil(3) as f64 + 6.0 } else { 0.0 };
    let points = || series.iter().flat_map(|s| &s.points);
    let xs = Scale::new(x, points().map(|p| p.0), (left, WIDTH - right));
    let ys = Scale::new(y, points().map(|p| p.1), (HEIGHT - bottom, top));
    let mut svg = begin(title, height);
    // Writing to a text cannot fail.
    for tick in ys.ticks() {
        let at = ys.at(tick);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{left}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - right,
            left - 6.0,
            at + 4.0,
            short(tick)
        );
    }
    for tick in xs.ticks() {
        let at = xs.at(tick);
        let base = HEIGHT - bottom;
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{base}\"/><text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            base + 16.0,
            short(tick)
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text><text transform=\"translate(13 {:.1}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
        (left + WIDTH - right) / 2.0,
        HEIGHT - 6.0,
        escape(x.label),
        (top + HEIGHT - bottom) / 2.0,
        escape(y.label)
    );
    for (number, one) in series.iter().enumerate() {
        let colour = format!("var(--c{})", number % COLOURS);
        let good = |p: &&(f64, f64)| {
            let fits = |v: f64, log: bool| v.is_finite() && (!log || v > 0.0);
            fits(p.0, x.log) && fits(p.1, y.log)
        };
        let places: Vec<(f64, f64)> =
            one.points.iter().filter(good).map(|p| (xs.at(p.0), ys.at(p.1))).collect();
        if one.line {
            let path: Vec<String> =
                places.iter().map(|p| format!("{:.1},{:.1}", p.0, p.1)).collect();
            let _ = write!(
                svg,
                "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>",
                path.join(" ")
            );
        }
        for (i, (px, py)) in places.iter().enumerate() {
            let _ =
                write!(svg, "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
            if let Some(label) = one.labels.get(i) {
                let (end, dx) = if *px > WIDTH * 0.8 { ("end", -6.0) } else { ("start", 6.0) };
                let _ = write!(
                    svg,
                    "<text class=\"small\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{end}\">{}</text>",
                    px + dx,
                    // Of two points that are close one has its name above and one below.
                    if number.is_multiple_of(2) { py - 6.0 } else { py + 13.0 },
                    escape(label)
                );
            }
        }
        if named {
            let (column, row) = (number % 3, number / 3);
            let (lx, ly) = (left + 195.0 * column as f64, HEIGHT + 10.0 + 18.0 * row as f64);
            let _ = write!(
                svg,
                "<rect x=\"{lx:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                ly - 8.0,
                lx + 18.0,
                ly + 2.0,
                escape(&one.name)
            );
        }
    }
    svg.push_str("</svg>");
    svg
}

/// A table of coloured cells: `cells` by row and column, `None` where nothing was measured. Darker is more.
pub(super) fn heat_map(
    title: &str,
    rows: &[String],
    columns: &[String],
    cells: &[Vec<Option<f64>>],
) -> String {
    const ROW: f64 = 30.0;
    const HEAD: f64 = 26.0;
    const NAMES: f64 = 170.0;
    let height = HEAD + ROW * rows.len() as f64 + 4.0;
    let width = (WIDTH - NAMES) / columns.len().max(1) as f64;
    let most = cells.iter().flatten().flatten().fold(0.0f64, |a, b| a.max(*b));
    let mut svg = begin(title, height);
    for (c, name) in columns.iter().enumerate() {
        let x = NAMES + width * (c as f64 + 0.5);
        let _ = write!(
            svg,
            "<text x=\"{x:.1}\" y=\"17\" text-anchor=\"middle\">{}</text>",
            escape(name)
        );
    }
    for (r, name) in rows.iter().enumerate() {
        let y = HEAD + ROW * r as f64;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            NAMES - 8.0,
            y + 19.0,
            escape(name)
        );
        for (c, cell) in cells[r].iter().enumerate() {
            let x = NAMES + width * c as f64;
            let share = cell.map_or(0.0, |v| (v / most.max(1e-12)).clamp(0.0, 1.0));
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"var(--c0)\" fill-opacity=\"{:.2}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                width - 2.0,
                ROW - 2.0,
                0.08 + 0.6 * share,
                x + width / 2.0,
                y + 19.0,
                cell.map_or_else(|| "–".to_owned(), short)
            );
        }
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Axis<'_> = Axis { label: "a < b", log: false, from_zero: true };

    #[test]
    fn ticks_are_round_and_inside() {
        let ticks =
            |axis, values: &[f64]| Scale::new(axis, values.iter().copied(), (0.0, 100.0)).ticks();
        assert_eq!(ticks(PLAIN, &[0.0, 9.0]), [0.0, 2.0, 4.0, 6.0, 8.0]);
        let log = Axis { log: true, ..PLAIN };
        assert_eq!(ticks(log, &[1.0, 8.0]), [1.0, 2.0, 5.0]);
        assert_eq!(ticks(log, &[0.001, 0.0, 2.0]), [0.001, 0.01, 0.1, 1.0]);
        assert_eq!(ticks(log, &[2.6, 4.8]), [3.0, 4.0, 5.0]);
        // Nothing, and one value, are drawn too.
        assert!(!ticks(PLAIN, &[]).is_empty() && !ticks(PLAIN, &[3.0]).is_empty());
    }

    #[test]
    fn places_are_in_the_frame_and_texts_escaped() {
        let one = Series {
            name: "x & y".to_owned(),
            points: vec![(1.0, 2.0), (3.0, -4.0), (f64::NAN, 1.0)],
            labels: vec!["<p>".to_owned()],
            line: true,
        };
        let svg = chart("t", PLAIN, PLAIN, &[one.clone(), one]);
        assert_eq!(svg.matches("<circle").count(), 4);
        assert!(svg.contains("a &lt; b") && svg.contains("&lt;p&gt;") && svg.contains("x &amp; y"));
        assert!(!svg.contains("NaN") && svg.ends_with("</svg>"));
    }

    #[test]
    fn numbers_are_short() {
        let found = [0.0, 123.4, 12.34, 0.5, 0.0123, 0.00001].map(short);
        assert_eq!(found, ["0", "123", "12.3", "0.5", "0.0123", "1e-5"]);
    }

    #[test]
    fn empty_cells_are_a_dash() {
        let names = ["r".to_owned()];
        let svg =
            heat_map("t", &names, &["c".to_owned(), "d".to_owned()], &[vec![Some(3.0), None]]);
        assert!(svg.contains(">3</text>") && svg.contains(">–</text>"));
    }
}
