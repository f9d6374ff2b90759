// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Random numbers for benchmarks: the same in every run.

/// Xorshift with 64 bits of state.
pub struct Random(u64);

impl Random {
    /// Always the same sequence.
    pub fn new() -> Self {
        Self(0x9e37_79b9_7f4a_7c15)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }
}
