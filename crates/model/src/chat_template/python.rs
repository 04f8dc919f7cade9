//! What a template may call: `raise_exception`, `strftime_now`, the methods of Python's types.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Environment, Error, ErrorKind, Value};

use crate::error::ModelError;

/// The words a template gave to `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// Adds the functions and methods to `environment`.
pub(super) fn add_to(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
    });
}

/// One line: what a template raised, in its own words; else what is wrong and the line.
pub(super) fn template_error(error: &Error) -> ModelError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(raised) = inner.downcast_ref::<Raised>() {
            return ModelError::Template { what: raised.0.clone() };
        }
        cause = inner.source();
    }
    let mut what = match error.line() {
        Some(line) => format!("line {line}: {}", error.kind()),
        None => error.kind().to_string(),
    };
    if let Some(detail) = error.detail() {
        what = format!("{what}: {detail}");
    }
    ModelError::Template { what }
}

/// The function `strftime_now(format)` for a given time, in UTC.
pub(super) fn strftime_now(now: SystemTime) -> Value {
    Value::from_function(move |format: String| strftime(&format, now))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// 1970-01-01 was a Thursday.
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// C's `strftime` in the C locale, UTC. A directive it does not know stays as it is.
fn strftime(format: &str, now: SystemTime) -> String {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_secs());
    let (days, in_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (in_day / 3600, in_day / 60 % 60, in_day % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let name = |names: &[&'static str], at: u64| names.get(at as usize).copied().unwrap_or("");
    let (month_name, day_name) = (name(&MONTHS, month - 1), name(&DAYS, days % 7));
    let short = |name: &'static str| name.get(..3).unwrap_or(name);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let unpadded = directive == Some('-');
        if unpadded {
            directive = chars.next();
        }
        let number = |value: u64, width: usize| {
            if unpadded { value.to_string() } else { format!("{value:0width$}") }
        };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') if unpadded => day.to_string(),
            Some('e') => format!("{day:2}"),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(days - days_before(year, 1, 1) + 1, 3),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => short(month_name).to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => short(day_name).to_owned(),
            Some('F') => strftime("%Y-%m-%d", now),
            Some('T') => strftime("%H:%M:%S", now),
            Some('D') => strftime("%m/%d/%y", now),
            Some('R') => strftime("%H:%M", now),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('n') => "\n".to_owned(),
            Some('t') => "\t".to_owned(),
            Some('%') => "%".to_owned(),
            Some(other) if unpadded => format!("%-{other}"),
            Some(other) => format!("%{other}"),
            None if unpadded => "%-".to_owned(),
            None => "%".to_owned(),
        };
        out.push_str(&text);
    }
    out
}

/// Year, month (1 to 12) and day of the month of a day counted from 1970-01-01.
fn civil(days: u64) -> (u64, u64, u64) {
    // Four centuries of 146,097 days repeat; the year is taken to start in March, so that the leap
    // day is its last (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let shifted = days + 719_468;
    let (era, in_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * in_year + 2) / 153;
    let day = in_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

/// Days from 1970-01-01 to a date not before it: the inverse of [`civil`].
fn days_before(year: u64, month: u64, day: u64) -> u64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year / 400, year % 400);
    let from_march = (month + 9) % 12;
    let in_year = (153 * from_march + 2) / 5 + day - 1;
    let in_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + in_year;
    (era * 146_097 + in_era).saturating_sub(719_468)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64, format: &str) -> String {
        strftime(format, UNIX_EPOCH + Duration::from_secs(seconds))
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(at(0, "%A %d %B %Y, %j"), "Thursday 01 January 1970, 001");
        assert_eq!(at(1_709_164_800, "%a %F %T %p"), "Thu 2024-02-29 00:00:00 AM");
        assert_eq!(at(1_735_689_599, "%d %b %Y %H:%M:%S %j %I%p"), "31 Dec 2024 23:59:59 366 11PM");
        assert_eq!(at(1_709_510_400, "%-d/%-m/%y %e %%"), "4/3/24  4 %");
        assert_eq!(at(0, "%q %-q %"), "%q %-q %");
    }

    #[test]
    fn every_day_of_a_cycle_is_the_day_after_the_one_before() {
        let mut before = civil(0);
        for days in 1..146_097 {
            let date = civil(days);
            assert_eq!(days_before(date.0, date.1, date.2), days);
            let next_day = (before.0, before.1, before.2 + 1);
            let next_month = (before.0, before.1 + 1, 1);
            let next_year = (before.0 + 1, 1, 1);
            assert!([next_day, next_month, next_year].contains(&date), "{before:?} {date:?}");
            before = date;
        }
        assert_eq!(before, (2369, 12, 31));
    }
}
