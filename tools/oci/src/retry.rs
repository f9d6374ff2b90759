// SPDX-License-Identifier: GPL-2.0

//! Trying again: what may work another time, when, and how often.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant, SystemTime},
};

use crate::error::{Error, Kind, Result};

/// Longest wait that a registry may ask for.
const MAX_ASKED: Duration = Duration::from_secs(300);
/// Longest wait of our own.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// How often a waiting thread looks whether it should stop.
const STEP: Duration = Duration::from_millis(100);

/// How often something is tried.
#[derive(Clone, Copy, Debug)]
pub struct Retries {
    /// Tries without any progress.
    pub tries: u32,
    /// Wait after the first; each further one is twice as long.
    pub first: Duration,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            tries: 5,
            first: Duration::from_secs(1),
        }
    }
}

/// Why a try failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It may work another time, not before a time that the registry named.
    Again(Error, Option<Duration>),
    /// It will not.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

impl Failure {
    pub(crate) fn into_error(self) -> Error {
        match self {
            Self::Again(error, _) | Self::Final(error) => error,
        }
    }
}

/// Counts tries and waits between them.
pub(crate) struct Backoff<'a> {
    retries: Retries,
    failed: u32,
    stop: &'a AtomicBool,
}

impl<'a> Backoff<'a> {
    pub(crate) fn new(retries: Retries, stop: &'a AtomicBool) -> Self {
        Self {
            retries,
            failed: 0,
            stop,
        }
    }

    /// Something was achieved: count from the start again.
    pub(crate) fn progress(&mut self) {
        self.failed = 0;
    }

    /// Waits after a failure, or gives it back as final. `waiting` hears for how long and why.
    pub(crate) fn wait(
        &mut self,
        failure: Failure,
        mut waiting: impl FnMut(Duration, &str),
    ) -> Result<()> {
        let (error, asked) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Again(error, asked) => (error, asked),
        };
        self.failed += 1;
        if self.failed >= self.retries.tries || asked.is_some_and(|asked| asked > MAX_ASKED) {
            return Err(error);
        }
        let own = (self.retries.first * 2_u32.saturating_pow(self.failed - 1)).min(MAX_WAIT);
        // Half to one and a half times, so that many clients do not come at once.
        let jitter = 0.5 + RandomState::new().hash_one(self.failed) as f64 / u64::MAX as f64;
        let wait = asked.unwrap_or_default().max(own.mul_f64(jitter));
        let why = error
            .status()
            .map_or_else(|| error.what().to_owned(), |status| status.to_string());
        tracing::debug!(%error, ?wait, "trying again");
        waiting(wait, &why);
        let end = Instant::now() + wait;
        loop {
            check(self.stop)?;
            match end.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => std::thread::sleep(left.min(STEP)),
                _ => return Ok(()),
            }
        }
    }

    /// Does `action` until it works or fails for good.
    pub(crate) fn run<T>(
        mut self,
        mut waiting: impl FnMut(Duration, &str),
        mut action: impl FnMut() -> std::result::Result<T, Failure>,
    ) -> Result<T> {
        loop {
            check(self.stop)?;
            match action() {
                Ok(value) => return Ok(value),
                Err(failure) => self.wait(failure, &mut waiting)?,
            }
        }
    }
}

/// Ends with an error when `stop` was set.
pub(crate) fn check(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        return Err(Error::new(
            Kind::Cancelled,
            "transfer",
            "given up, as another one failed",
        ));
    }
    Ok(())
}

/// The wait that a `Retry-After` asks for: seconds or a date.
pub(crate) fn retry_after(value: &str) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(value).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn again(asked: Option<Duration>) -> Failure {
        Failure::Again(Error::new(Kind::Temporary, "h", "busy"), asked)
    }

    #[test]
    fn tries_end_and_progress_counts() {
        let stop = AtomicBool::new(false);
        let retries = Retries {
            tries: 3,
            first: Duration::from_micros(1),
        };
        let mut backoff = Backoff::new(retries, &stop);
        for _ in 0..10 {
            backoff.wait(again(None), |_, _| ()).unwrap();
            backoff.progress();
        }
        backoff.wait(again(None), |_, _| ()).unwrap();
        backoff.wait(again(None), |_, _| ()).unwrap();
        backoff.wait(again(None), |_, _| ()).unwrap_err();
        let mut count = 0;
        let result: Result<()> = Backoff::new(retries, &stop).run(
            |_, _| (),
            || {
                count += 1;
                Err(again(None))
            },
        );
        assert!(result.is_err());
        assert_eq!(count, 3);
    }

    #[test]
    fn what_the_registry_asks_for_is_waited_for() {
        let stop = AtomicBool::new(false);
        let mut backoff = Backoff::new(
            Retries {
                tries: 9,
                first: Duration::ZERO,
            },
            &stop,
        );
        let mut waited = Duration::ZERO;
        backoff
            .wait(again(Some(Duration::from_millis(20))), |wait, _| {
                waited = wait
            })
            .unwrap();
        assert_eq!(waited, Duration::from_millis(20));
        assert!(backoff
            .wait(again(Some(Duration::from_secs(301))), |_, _| ())
            .is_err());
        stop.store(true, Ordering::Relaxed);
        let error = backoff
            .wait(again(Some(Duration::from_secs(200))), |_, _| ())
            .unwrap_err();
        assert_eq!(error.kind(), Kind::Cancelled);
    }

    #[test]
    fn values_of_the_header() {
        assert_eq!(retry_after(" 7 "), Some(Duration::from_secs(7)));
        assert_eq!(
            retry_after("Wed, 21 Oct 2015 07:28:00 GMT"),
            Some(Duration::ZERO)
        );
        let soon = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        assert!(retry_after(&soon).unwrap() > Duration::from_secs(90));
        assert_eq!(retry_after("soon"), None);
        assert_eq!(retry_after("-1"), None);
    }
}
