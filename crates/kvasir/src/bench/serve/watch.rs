//! A server's own numbers, from its metrics page.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::client::Client;

/// How often the page is read.
const PERIOD: Duration = Duration::from_millis(100);

/// What a page says, summed over engines and models; absent where it does not.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Sample {
    running: Option<f64>,
    preemptions: Option<f64>,
    physical_bytes: Option<f64>,
}

/// What was seen from start to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Watched {
    /// Most sequences in the batch at any reading.
    pub(super) max_running: Option<usize>,
    /// Sequences preempted.
    pub(super) preemptions: Option<u64>,
    /// Most bytes of the cache at any reading.
    pub(super) peak_kv_physical_bytes: Option<u64>,
}

/// Reads the page of a server that has one until it is stopped.
#[derive(Debug)]
pub(super) struct Watcher {
    stop: Sender<()>,
    thread: JoinHandle<Watched>,
}

impl Watcher {
    /// Starts to read, after a first reading that is made before this returns.
    pub(super) fn start(client: Client) -> Self {
        let (stop, stopped) = channel();
        let first = read(&client);
        let thread = thread::spawn(move || {
            let Some(first) = first else { return Watched::default() };
            let (mut peak, mut last) = (first, first);
            let mut on = true;
            while on {
                on = stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout);
                if let Some(sample) = read(&client) {
                    peak = peak.max(sample);
                    last = sample;
                }
            }
            Watched {
                max_running: peak.running.map(|n| n as usize),
                preemptions: first.preemptions.zip(last.preemptions).map(|(a, b)| (b - a) as u64),
                peak_kv_physical_bytes: peak.physical_bytes.map(|n| n as u64),
            }
        });
        Self { stop, thread }
    }

    /// Reads a last time.
    pub(super) fn stop(self) -> Watched {
        // A thread that has ended needs no word.
        let _ = self.stop.send(());
        self.thread.join().unwrap_or_default()
    }
}

impl Sample {
    fn max(self, other: Self) -> Self {
        let max = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
        Self {
            running: max(self.running, other.running),
            preemptions: max(self.preemptions, other.preemptions),
            physical_bytes: max(self.physical_bytes, other.physical_bytes),
        }
    }
}

fn read(client: &Client) -> Option<Sample> {
    Some(parse(&client.get("/metrics").ok()?))
}

/// Reads the text format of Prometheus.
fn parse(page: &str) -> Sample {
    let mut sample = Sample::default();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let field = match series.split('{').next().unwrap_or_default() {
            "vllm:num_requests_running" => &mut sample.running,
            "vllm:num_preemptions_total" => &mut sample.preemptions,
            "kvasir_kv_physical_bytes" => &mut sample.physical_bytes,
            _ => continue,
        };
        if let Ok(value) = value.parse::<f64>() {
            *field = Some(field.unwrap_or(0.0) + value);
        }
    }
    sample
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_kvasir_and_vllm() {
        let page = "# HELP vllm:num_requests_running Sequences running\n\
                    # TYPE vllm:num_requests_running gauge\n\
                    vllm:num_requests_running{model_name=\"a b\",engine=\"0\"} 3.0\n\
                    vllm:num_requests_running{model_name=\"a b\",engine=\"1\"} 2\n\
                    vllm:num_preemptions_total{engine=\"0\"} 7\n\
                    kvasir_kv_physical_bytes{engine=\"0\"} 1048576\n\
                    vllm:num_requests_running_x 9\n\
                    odd\n";
        let found = parse(page);
        let expected = Sample {
            running: Some(5.0),
            preemptions: Some(7.0),
            physical_bytes: Some(1_048_576.0),
        };
        assert_eq!(found, expected);
        assert_eq!(parse("llamacpp:requests_processing 1\n"), Sample::default());
        let later = Sample { running: Some(4.0), physical_bytes: None, ..expected };
        assert_eq!(expected.max(later), expected);
        assert_eq!(Sample::default().max(later), later);
    }
}
