//! The two text formats of `/metrics`.

/// Sent to scrapers that ask for OpenMetrics.
pub(crate) const OPENMETRICS_TYPE: &str =
    "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Sent to everybody else.
pub(crate) const CLASSIC_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// OpenMetrics as the older Prometheus text. There, the `# TYPE` of a counter carries the name
/// with `_total`; under the OpenMetrics name, older parsers would take it for untyped.
pub(crate) fn to_classic(openmetrics: &str) -> String {
    let mut classic = String::with_capacity(openmetrics.len() + 1024);
    let mut help: Option<(&str, &str)> = None;
    for line in openmetrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) =
            line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let suffix = if kind == "counter" { "_total" } else { "" };
            if let Some((_, text)) = help.take() {
                push_line(&mut classic, &["# HELP ", name, suffix, " ", text]);
            }
            push_line(&mut classic, &["# TYPE ", name, suffix, " ", kind]);
        } else if line != "# EOF" {
            push_line(&mut classic, &[line]);
        }
    }
    classic
}

fn push_line(text: &mut String, parts: &[&str]) {
    for part in parts {
        text.push_str(part);
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renames_counters_only() {
        let open = "# HELP a A.\n# TYPE a counter\na_total{x=\"1\"} 3\n# HELP b_total B.\n\
                    # TYPE b_total histogram\nb_total_sum 0.0\n# EOF\n";
        let classic = "# HELP a_total A.\n# TYPE a_total counter\na_total{x=\"1\"} 3\n\
                       # HELP b_total B.\n# TYPE b_total histogram\nb_total_sum 0.0\n";
        assert_eq!(to_classic(open), classic);
    }
}
