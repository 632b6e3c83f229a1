//! The shim's error: a text for people and a ttrpc code for containerd.

use containerd_shim::protos::ttrpc;
use std::fmt::Display;
use ttrpc::Code;

/// Result with the shim's [`Error`].
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// An error as it leaves the shim.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Error {
    code: Code,
    text: String,
}

/// Constructors, one per code.
macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:ident;)*) => {$(
        $(#[$doc])*
        pub(crate) fn $name(text: impl Into<String>) -> Self {
            Self { code: Code::$code, text: text.into() }
        }
    )*};
}

impl Error {
    codes! {
        /// No such container or process.
        not_found = NOT_FOUND;
        /// The id is taken.
        already_exists = ALREADY_EXISTS;
        /// Not in the state that the container is in.
        failed_precondition = FAILED_PRECONDITION;
        /// The request itself is wrong.
        invalid_argument = INVALID_ARGUMENT;
        /// The shim does not do this.
        unimplemented = UNIMPLEMENTED;
        /// It took too long.
        deadline_exceeded = DEADLINE_EXCEEDED;
        /// Anything else.
        internal = UNKNOWN;
    }

    /// The code for containerd.
    #[cfg(test)]
    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// Whether it took too long, and may still come to an end.
    pub(crate) fn is_deadline(&self) -> bool {
        self.code == Code::DEADLINE_EXCEEDED
    }

    /// The same error with `more` behind it.
    pub(crate) fn also(self, more: impl Display) -> Self {
        Self { text: format!("{}; {more}", self.text), ..self }
    }

    /// The same error with `context` in front.
    pub(crate) fn context(self, context: impl Display) -> Self {
        Self { text: format!("{context}: {}", self.text), ..self }
    }
}

/// Adds what was being done to a foreign error, and turns it into an internal one.
pub(crate) trait Context<T> {
    /// `context` says what was being done: "mount the root file system".
    fn context(self, context: impl Display) -> Result<T>;
}

impl<T, E: std::error::Error> Context<T> for std::result::Result<T, E> {
    fn context(self, context: impl Display) -> Result<T> {
        self.map_err(|err| {
            let mut text = format!("{context}: {err}");
            let mut source = err.source();
            while let Some(err) = source {
                text = format!("{text}: {err}");
                source = err.source();
            }
            Error::internal(text)
        })
    }
}

impl From<Error> for ttrpc::Error {
    fn from(err: Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(err.code, err.text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_reaches_the_wire() {
        let err = Error::failed_precondition("no").context("start a");
        assert_eq!(err.code(), Code::FAILED_PRECONDITION);
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(err) else {
            panic!("not a status");
        };
        assert_eq!(status.code(), Code::FAILED_PRECONDITION);
        assert_eq!(status.message(), "start a: no");
    }

    #[test]
    fn foreign_errors_keep_their_causes() {
        let io = std::io::Error::from(std::io::ErrorKind::NotFound);
        let err = Err::<(), _>(io).context("read the spec").unwrap_err();
        assert!(err.to_string().starts_with("read the spec: "), "{err}");
    }
}
