//! The commands.

pub mod get;
