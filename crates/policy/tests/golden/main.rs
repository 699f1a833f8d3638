//! openpi's own outputs, compared number by number.

mod fixture;
mod images;
mod normalise;
mod policies;
mod prompts;
