// SPDX-License-Identifier: GPL-2.0

//! A limit to the rate of all transfers together.

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

/// Time that may be made up for after a pause.
const BURST: Duration = Duration::from_millis(100);

/// Lets a number of bytes a second pass.
#[derive(Debug, Default)]
pub struct Limiter {
    rate: Option<u64>,
    /// When what has passed so far would have passed at the rate.
    due: Mutex<Option<Instant>>,
}

impl Limiter {
    /// `rate` bytes a second, or any number of them.
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            rate: rate.filter(|rate| *rate > 0),
            due: Mutex::new(None),
        }
    }

    /// Waits until `bytes` may pass.
    pub fn pass(&self, bytes: usize) {
        if let Some(wait) = self.wait(bytes, Instant::now()) {
            std::thread::sleep(wait);
        }
    }

    fn wait(&self, bytes: usize, now: Instant) -> Option<Duration> {
        let rate = self.rate?;
        let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut due = self
            .due
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let next = due.map_or(earliest, |due| due.max(earliest)) + cost;
        *due = Some(next);
        next.checked_duration_since(now)
            .filter(|wait| !wait.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds() {
        let limiter = Limiter::new(Some(1000));
        let start = Instant::now();
        assert_eq!(limiter.wait(100, start), None);
        assert_eq!(limiter.wait(500, start), Some(Duration::from_millis(500)));
        assert_eq!(limiter.wait(500, start), Some(Duration::from_millis(1000)));
        // A long pause does not save up.
        let later = start + Duration::from_secs(100);
        assert_eq!(limiter.wait(1100, later), Some(Duration::from_millis(1000)));
        assert_eq!(Limiter::new(None).wait(usize::MAX, start), None);
        assert_eq!(Limiter::new(Some(0)).wait(1, start), None);
    }
}
