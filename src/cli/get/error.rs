//! Why a download ended without its file, and the exit code that says so to scripts.

use std::io;
use std::path::PathBuf;

/// Why a download failed. `Display` is the one line that the user reads: what went wrong, where,
/// and what to do. No variant holds a credential: URLs are shown without user information and query.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GetError {
    /// The command line cannot be carried out as it stands.
    #[error("{0}")]
    Usage(String),
    /// The bytes are not what the server said they are: a checksum or a length that differs.
    #[error("{0}")]
    Data(String),
    /// 404 or 410.
    #[error("{url}: the server answered {status}; check the URL")]
    NotFound {
        /// What was asked for.
        url: String,
        /// The status line's code and reason.
        status: String,
    },
    /// The server could not be reached, or did not deliver, after all retries.
    #[error("{0}")]
    Unavailable(String),
    /// The output, its part file or its state file cannot be created or is in use.
    #[error("cannot create {}: {why}", path.display())]
    Create {
        /// The file.
        path: PathBuf,
        /// What the system, or we, object to.
        why: String,
    },
    /// Writing failed midway.
    #[error("cannot write {}: {source}; {advice}", path.display())]
    Output {
        /// The file, or `standard output`.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
        /// What the user can do.
        advice: &'static str,
    },
    /// The object was replaced more often than `--max-restarts`, or after bytes had left for standard
    /// output, from where nothing can be taken back.
    #[error("{0}")]
    KeptChanging(String),
    /// The server's answers contradict HTTP or each other, so that no byte of them can be trusted.
    #[error("{0}")]
    Protocol(String),
    /// 401 or 403.
    #[error("{url}: the server answered {status}; {advice}")]
    Denied {
        /// What was asked for.
        url: String,
        /// The status line's code and reason.
        status: String,
        /// What the user can do.
        advice: &'static str,
    },
    /// The user pressed Ctrl-C.
    #[error("interrupted; {0}")]
    Interrupted(String),
}

impl GetError {
    /// The process's exit code (`sysexits.h`, and 128 + SIGINT), as `--help` documents it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 64,
            Self::Data(_) => 65,
            Self::NotFound { .. } => 66,
            Self::Unavailable(_) => 69,
            Self::Create { .. } => 73,
            Self::Output { .. } => 74,
            Self::KeptChanging(_) => 75,
            Self::Protocol(_) => 76,
            Self::Denied { .. } => 77,
            Self::Interrupted(_) => 130,
        }
    }
}
