//! Errors that say what was being done.

use containerd_client::tonic::{Code, Status};

/// Result of a call to containerd.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why containerd, or what it holds, did not do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The socket does not answer.
    #[error("cannot reach containerd at {address}; is it running, and is --address its socket?")]
    Connect {
        /// Path of the socket.
        address: String,
        /// What the connection failed with.
        #[source]
        source: containerd_client::tonic::transport::Error,
    },
    /// containerd refused, or broke off.
    #[error("{doing}: {message}")]
    Call {
        /// What was being done, for people.
        doing: String,
        /// containerd's reason, for programs.
        code: Code,
        /// containerd's reason, for people.
        message: String,
    },
    /// containerd did not answer.
    #[error("{doing}: no answer from containerd within {seconds} s")]
    Timeout {
        /// What was being done.
        doing: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A blob that an image needs is not in the content store.
    #[error(
        "the {what} {digest} of the image is not in the content store (pulled with its layers discarded, or \
         for another platform?); pull the image again, without --skip-unpack or discarded layers"
    )]
    MissingBlob {
        /// Role of the blob: index, manifest, config or layer.
        what: &'static str,
        /// Digest of the blob.
        digest: String,
    },
    /// The image has nothing for this host's platform.
    #[error("the image {digest} has no manifest for {platform}")]
    NoPlatform {
        /// Digest of the image's index.
        digest: String,
        /// `os/architecture` of this host.
        platform: String,
    },
    /// The container's root file system is not the image's plus a writable layer.
    #[error(
        "the snapshot {key} of the container is based on {found}, not on its image ({expected}); was the image's \
         name given to another image since? tag the image that the container was made from with that name again"
    )]
    NotBasedOnImage {
        /// Key of the container's snapshot.
        key: String,
        /// Its parent, or `nothing`.
        found: String,
        /// Chain id of the image.
        expected: String,
    },
    /// The container's root file system is none that can be carried over.
    #[error("the root file system of the container cannot be moved: {0}")]
    RootFs(String),
    /// Something read has no meaning: a digest, a manifest, a record.
    #[error("{what}: {why}")]
    Invalid {
        /// What was read.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

impl Error {
    /// Something that is not what it should be.
    pub(super) fn invalid(what: impl Into<String>, why: impl ToString) -> Self {
        Self::Invalid { what: what.into(), why: why.to_string() }
    }

    fn code(&self) -> Option<Code> {
        match self {
            Self::Call { code, .. } => Some(*code),
            _ => None,
        }
    }

    /// The object does not exist.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Some(Code::NotFound)
    }

    /// The object exists already.
    pub(crate) fn is_already_exists(&self) -> bool {
        self.code() == Some(Code::AlreadyExists)
    }

    /// The object is not in a state in which that can be done.
    pub(crate) fn is_failed_precondition(&self) -> bool {
        self.code() == Some(Code::FailedPrecondition)
    }
}

/// Gives a status its context.
pub(super) trait Doing<T> {
    /// Names what was being done when the call failed.
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, Status> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|status| Error::Call {
            doing: what(),
            code: status.code(),
            message: match status.message() {
                "" => status.code().description().to_owned(),
                message => message.to_owned(),
            },
        })
    }
}

/// Takes NOT_FOUND as an answer: the object is not there.
pub(super) trait Found<T> {
    /// `None` for NOT_FOUND.
    fn found(self) -> Result<Option<T>>;
}

impl<T> Found<T> for Result<T> {
    fn found(self) -> Result<Option<T>> {
        match self {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }
}
