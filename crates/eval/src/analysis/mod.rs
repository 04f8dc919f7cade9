//! What outputs of the same samples under different recipes say: which samples a recipe fails, and how it changes lengths.

mod bootstrap;
mod length;
mod negatives;

pub use bootstrap::{Interval, interval};
pub use length::{LengthShift, Lengths, Shift};
pub use negatives::{Negatives, Scored, Share, THETA, THETAS};
