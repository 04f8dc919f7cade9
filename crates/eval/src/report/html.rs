//! A report as one page: styles, tables and plots are in it, nothing is fetched, and it follows the reader's light or dark.

use std::fmt::Write;

use super::predicted::predicted;
use super::summary::{LaneSummary, WorstSample};
use super::svg::{Axis, Series, chart, heat_map, short};
use super::{Report, RunSummary, diff};
use crate::analysis::{Share, THETA};
use crate::profile::Cell;
use crate::suite::extras::QualityPoint;

const STYLE: &str = include_str!("style.css");

/// Text that stands for itself in HTML, in attributes too.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // Control characters but line breaks are not allowed in a page.
            c if c.is_control() && c != '\n' && c != '\t' => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The whole page. O(its length).
pub fn page(report: &Report) -> String {
    let mut page = String::new();
    let title = report.runs.first().map_or("kvasir", |run| &run.model);
    // Writing to a text cannot fail, here and below.
    let _ = write!(
        page,
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>{0}: what compression costs</title><style>{STYLE}</style></head><body><h1>What compression costs: {0}</h1>",
        escape(title)
    );
    for run in &report.runs {
        section_of_run(&mut page, run, report.runs.len() > 1);
    }
    page.push_str("</body></html>\n");
    page
}

fn section_of_run(page: &mut String, run: &RunSummary, named: bool) {
    if named {
        let _ = write!(page, "<h2>{}</h2>", escape(&run.path));
    }
    let environment = &run.environment;
    let _ = write!(
        page,
        "<p class=\"note\">{} samples, {} of them answered by every recipe and compared; kvasir {}, {} threads of {}, {}.</p>",
        run.samples,
        run.complete,
        escape(&environment.version),
        environment.threads,
        escape(&environment.processor),
        escape(&environment.system)
    );
    let first = run.lanes.first().map_or("", |lane| &lane.name);
    figure(
        page,
        "Recipes",
        &format!(
            "Ratio: f16 bytes by bytes over all answers. Negative: a sample on which {first} scores at least its dataset's mean and the recipe loses {:.0} % of that or more; in brackets the bootstrap interval of 95 %.",
            100.0 * THETA
        ),
        &recipes_table(run),
    );
    if !run.quality.is_empty() {
        figure(
            page,
            "Rate and quality",
            "KL divergence from the f16 cache's predictions over the ratio of all resident bytes; further down and to the right is better.",
            &quality_chart(&run.quality),
        );
    }
    if run.recipes().next().is_some() {
        figure(
            page,
            "Negatives",
            "Share of the benign samples that lose at least so much, per cent; the last is what fails under all recipes at once.",
            &negatives_chart(run),
        );
        figure(page, "Negatives by family", "At a tenth.", &families_table(run));
        figure(
            page,
            "Negatives of two recipes at once",
            "At a tenth: samples that fail under both. If the errors were independent of each other, these would be few.",
            &pairs_table(run),
        );
    }
    figure(page, "Mean scores", "Per cent.", &datasets_table(run));
    if run.lanes.iter().any(|lane| lane.lengths.known > 0) {
        figure(
            page,
            "Lengths of answers",
            "D = (length under f16 − length) ÷ length under f16: below 0 the answer became longer. The last bin on either side has all that is beyond. \
             What a temperature alone changes stands beside it as a control. Answers cut at the most tokens allowed are not in it; they are counted in the table.",
            &format!("{}{}", lengths_chart(run), lengths_table(run)),
        );
    }
    predicted(page, run);
    speed(page, run);
    if !run.worst.is_empty() {
        let _ = write!(page, "<section><h3>Largest losses</h3>");
        for sample in &run.worst {
            worst(page, sample);
        }
        page.push_str("</section>");
    }
}

pub(super) fn figure(page: &mut String, title: &str, note: &str, body: &str) {
    let (title, note) = (escape(title), escape(note));
    let _ = write!(
        page,
        "<section><h3>{title}</h3><div class=\"scroll\">{body}</div><p class=\"note\">{note}</p></section>"
    );
}

/// A table; the first column is text, the others numbers.
pub(super) fn table(head: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut html = String::from("<table><thead><tr>");
    for name in head {
        let _ = write!(html, "<th>{}</th>", escape(name));
    }
    html.push_str("</tr></thead><tbody>");
    for row in rows {
        html.push_str("<tr>");
        for cell in row {
            let _ = write!(html, "<td>{}</td>", escape(&cell));
        }
        html.push_str("</tr>");
    }
    html.push_str("</tbody></table>");
    html
}

/// `12 of 140, 8.6 % [4.3, 13.6]`.
pub(super) fn of_benign(share: &Share) -> String {
    let interval = share.interval.map_or_else(String::new, |interval| {
        format!(" [{:.1}, {:.1}]", 100.0 * interval.low, 100.0 * interval.high)
    });
    format!("{} of {}, {:.1} %{interval}", share.negatives, share.benign, 100.0 * share.share())
}

/// The share at a tenth.
pub(super) fn at_theta<'a>(run: &RunSummary, lane: &'a LaneSummary) -> Option<&'a Share> {
    run.thetas.iter().position(|theta| *theta == THETA).and_then(|i| lane.negatives.get(i))
}

fn recipes_table(run: &RunSummary) -> String {
    let rows = run.lanes.iter().enumerate().map(|(number, lane)| {
        let compared = number > 0 && !lane.drawn;
        let negatives = at_theta(run, lane).filter(|_| compared);
        vec![
            lane.name.clone(),
            lane.ratio.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
            format!("{:.1}", 100.0 * lane.score),
            negatives.map_or_else(|| "–".to_owned(), of_benign),
            lane.answered.to_string(),
        ]
    });
    table(&["recipe", "ratio", "mean score, %", "negatives at 10 %", "answers"], rows)
}

fn quality_chart(points: &[QualityPoint]) -> String {
    // One colour for each family of recipes: what comes before the number at the end.
    let family = |recipe: &str| {
        let name = recipe.split(':').next().unwrap_or(recipe);
        name.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned()
    };
    let mut series: Vec<Series> = Vec::new();
    let mut sorted: Vec<&QualityPoint> = points.iter().collect();
    sorted.sort_by(|a, b| a.ratio_total.total_cmp(&b.ratio_total));
    for point in sorted {
        let name = family(&point.recipe);
        let place = series.iter().position(|one| one.name == name).unwrap_or_else(|| {
            series.push(Series { name, points: Vec::new(), labels: Vec::new(), line: true });
            series.len() - 1
        });
        series[place].points.push((point.ratio_total, point.kl_mean));
        series[place].labels.push(point.recipe.clone());
    }
    for one in &mut series {
        if let [only] = &one.labels[..] {
            one.name.clone_from(only);
        }
    }
    let x = Axis { label: "ratio of all resident bytes", log: true, from_zero: false };
    let y = Axis { label: "KL divergence, nats", log: true, from_zero: false };
    chart("KL divergence over ratio", x, y, &series)
}

fn negatives_chart(run: &RunSummary) -> String {
    let of = |name: &str, shares: &[Share]| {
        let points = run.thetas.iter().zip(shares);
        Series {
            name: name.to_owned(),
            points: points.map(|(theta, s)| (100.0 * theta, 100.0 * s.share())).collect(),
            labels: Vec::new(),
            line: true,
        }
    };
    let mut series: Vec<Series> =
        run.recipes().map(|lane| of(&lane.name, &lane.negatives)).collect();
    if series.len() > 1 {
        series.push(of("all at once", &run.of_all));
    }
    let x = Axis { label: "loss of score, per cent", log: true, from_zero: false };
    let y = Axis { label: "negatives, per cent", log: false, from_zero: true };
    chart("Negatives over loss", x, y, &series)
}

fn families_table(run: &RunSummary) -> String {
    let mut head = vec!["recipe"];
    head.extend(run.families.iter().map(String::as_str));
    let row = |lane: &LaneSummary| {
        let shares = lane.families.iter().map(of_benign);
        std::iter::once(lane.name.clone()).chain(shares).collect()
    };
    table(&head, run.recipes().map(row))
}

fn pairs_table(run: &RunSummary) -> String {
    let lanes: Vec<usize> = (1..run.lanes.len()).filter(|i| !run.lanes[*i].drawn).collect();
    let mut head = vec![""];
    head.extend(lanes.iter().map(|i| &*run.lanes[*i].name));
    let row = |a: &usize| {
        let counts = lanes.iter().map(|b| run.pairs[*a][*b].negatives.to_string());
        std::iter::once(run.lanes[*a].name.clone()).chain(counts).collect()
    };
    table(&head, lanes.iter().map(row))
}

fn datasets_table(run: &RunSummary) -> String {
    let mut head = vec!["dataset", "samples"];
    head.extend(run.lanes.iter().map(|lane| &*lane.name));
    let rows = run.datasets.iter().map(|dataset| {
        let scores = dataset.scores.iter().map(|score| format!("{:.1}", 100.0 * score));
        [dataset.name.clone(), dataset.samples.to_string()].into_iter().chain(scores).collect()
    });
    table(&head, rows)
}

fn lengths_chart(run: &RunSummary) -> String {
    let series = run.lanes.iter().skip(1).map(|lane| {
        let known = lane.lengths.known.max(1) as f64;
        let points = lane.lengths.histogram.iter();
        Series {
            name: lane.name.clone(),
            points: points.map(|(edge, n)| (*edge, 100.0 * *n as f64 / known)).collect(),
            labels: Vec::new(),
            line: true,
        }
    });
    let x = Axis { label: "D up to", log: false, from_zero: false };
    let y = Axis { label: "answers, per cent", log: false, from_zero: true };
    chart("Change of lengths", x, y, &series.collect::<Vec<_>>())
}

fn lengths_table(run: &RunSummary) -> String {
    let rows = run.lanes.iter().skip(1).map(|lane| {
        let lengths = &lane.lengths;
        let interval = lengths.interval.map_or_else(String::new, |interval| {
            format!(" [{:+.2}, {:+.2}]", interval.low, interval.high)
        });
        vec![
            lane.name.clone(),
            lengths.known.to_string(),
            format!("{:+.3}{interval}", lengths.mean),
            format!("{:+.3}", lengths.median),
            format!("{:.1}", 100.0 * lengths.longer),
            format!("{:.1}", 100.0 * lengths.shorter),
            format!("{:.3}", lengths.length_ratio),
            format!("{} · {}", lengths.capped_recipe, lengths.capped_baseline),
            lane.latency.map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}")),
        ]
    });
    let head = [
        "recipe",
        "answers",
        "mean D",
        "median D",
        "≥ 50 % longer, %",
        "≥ 50 % shorter, %",
        "length ÷ f16's",
        "cut: recipe · f16",
        "length × TPOT ÷ f16's",
    ];
    table(&head, rows)
}

fn speed(page: &mut String, run: &RunSummary) {
    if run.speed.is_empty() {
        return;
    }
    let mut columns: Vec<(usize, usize)> =
        run.speed.iter().map(|c| (c.num_seqs, c.context)).collect();
    columns.sort_unstable();
    columns.dedup();
    let mut recipes: Vec<String> = Vec::new();
    for cell in &run.speed {
        if !recipes.contains(&cell.recipe) {
            recipes.push(cell.recipe.clone());
        }
    }
    let names: Vec<String> =
        columns.iter().map(|(n, context)| format!("{n} × {context}")).collect();
    type Value = fn(&Cell) -> f64;
    let kinds: [(&str, &str, Value); 3] = [
        (
            "Decode",
            "Tokens a second of all sequences together; columns are sequences × tokens of context.",
            |c| c.decode,
        ),
        ("Prefill", "Tokens a second.", |c| c.prefill),
        ("Bytes", "MiB that all sequences held at the end.", |c| {
            c.physical_bytes as f64 / f64::from(1 << 20)
        }),
    ];
    for (title, note, value) in kinds {
        let cells: Vec<Vec<Option<f64>>> = recipes
            .iter()
            .map(|recipe| {
                let of = |(n, context): &(usize, usize)| {
                    let cell = run
                        .speed
                        .iter()
                        .find(|c| c.recipe == *recipe && c.num_seqs == *n && c.context == *context);
                    cell.map(value)
                };
                columns.iter().map(of).collect()
            })
            .collect();
        figure(page, title, note, &heat_map(title, &recipes, &names, &cells));
    }
    if !run.equal_memory.is_empty() {
        let rows = run.equal_memory.iter().map(|row| {
            vec![
                row.recipe.clone(),
                format!("{:.0}", row.throughput.output_tokens_per_second),
                row.throughput.max_running.to_string(),
                row.throughput.preemptions.to_string(),
                format!("{:.1}", row.throughput.peak_kv_physical_bytes as f64 / f64::from(1 << 20)),
            ]
        });
        let head = ["recipe", "output tokens a second", "most running", "preemptions", "peak MiB"];
        let budget = run.equal_memory[0].budget as f64 / f64::from(1 << 20);
        let note = format!("The same requests with {budget:.0} MiB of cache for each recipe.");
        figure(page, "At equal memory", &note, &table(&head, rows));
    }
    if !run.predicted.is_empty() {
        let mut series: Vec<Series> = Vec::new();
        for cell in &run.predicted {
            let place =
                series.iter().position(|one| one.name == cell.recipe).unwrap_or_else(|| {
                    let name = cell.recipe.clone();
                    series.push(Series {
                        name,
                        points: Vec::new(),
                        labels: Vec::new(),
                        line: false,
                    });
                    series.len() - 1
                });
            series[place].points.push((1e3 * cell.measured, 1e3 * cell.predicted));
        }
        let axis = |label| Axis { label, log: true, from_zero: false };
        let (x, y) = (axis("measured, ms"), axis("predicted, ms"));
        let plot = chart("Predicted against measured steps", x, y, &series);
        let note = "Times of steps in cells that the predictor has not seen.";
        figure(page, "Predicted and measured", note, &plot);
    }
}

fn worst(page: &mut String, sample: &WorstSample) {
    let of = |words: &[diff::Word<'_>]| -> String {
        let word = |(word, same): &diff::Word<'_>| match same {
            true => escape(word),
            false => format!("<mark>{}</mark>", escape(word)),
        };
        words.iter().map(word).collect()
    };
    let [baseline, found] = diff::words(&sample.baseline.0, &sample.found.0);
    let _ = write!(
        page,
        "<details><summary>{}: {} <span class=\"note\">{} → {}</span></summary><dl><dt>asked</dt><dd>{}</dd><dt>right</dt><dd>{}</dd><dt>f16</dt><dd>{}</dd><dt>{}</dt><dd>{}</dd></dl></details>",
        escape(&sample.lane),
        escape(&sample.sample),
        short(sample.baseline.1),
        short(sample.found.1),
        escape(&sample.question),
        escape(&sample.answer),
        of(&baseline),
        escape(&sample.lane),
        of(&found)
    );
}
