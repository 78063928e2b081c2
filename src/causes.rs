//! What went wrong, and why, on one line: for logs of either format and for people.
//!
//! The JSON lines of `tracing-subscriber` show an error without its sources, which is where S3's answer is.

use std::error::Error;

/// An error and its causes on one line, without saying anything twice: libraries repeat a cause in what they say
/// themselves.
pub(crate) fn one_line(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Because(&'static str, #[source] Option<Box<Self>>);

    #[test]
    fn every_cause_is_said_once() {
        let last = Because("connection refused", None);
        let middle = Because("no response: connection refused", Some(Box::new(last)));
        let first = Because("the remote was asked", Some(Box::new(middle)));
        assert_eq!(
            one_line(&first),
            "the remote was asked: no response: connection refused"
        );
    }
}
