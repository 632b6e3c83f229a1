//! What an item needs besides its program.

/// One item.
#[derive(Clone, Copy)]
pub(crate) struct Item {
    /// The workload's name for it.
    pub(crate) name: &'static str,
    /// Its checkpoint has to be told that there are file locks.
    pub(crate) locks: bool,
    /// Its container has a terminal.
    pub(crate) terminal: bool,
    /// How often it goes from host to host.
    pub(crate) hops: usize,
    /// Before it looks, a process is started in its container, which says what its clocks say.
    pub(crate) exec: bool,
    /// Its container has limits and sees its group.
    pub(crate) limits: bool,
    /// It is of another user than the first: CRIU needs CAP_SYS_RESOURCE to read its limits.
    pub(crate) other_user: bool,
    /// It does not survive; part of the text that says so.
    pub(crate) lost: Option<&'static str>,
}

impl Item {
    /// One that needs nothing.
    pub(crate) const PLAIN: Self = Self {
        name: "",
        locks: false,
        terminal: false,
        hops: 1,
        exec: false,
        limits: false,
        other_user: false,
        lost: None,
    };

    pub(crate) fn called(self, name: &'static str) -> Self {
        Self { name, ..self }
    }
}
