//! What a checkpoint loses of open files, and can be seen in `/proc/PID/fdinfo`. CRIU 4.2 keeps neither.

/// Whether an eventfd is a semaphore: it comes back as a plain one. Kernels before 6.5 do not tell.
pub(super) fn is_semaphore(info: &str) -> bool {
    value(info, "eventfd-semaphore:") == Some("1")
}

/// Whether a timer that goes off again and again has done so and nobody has read it: once restored it
/// stands still.
pub(super) fn is_unread_timer(info: &str) -> bool {
    let ticks = value(info, "ticks:").is_some_and(|ticks| ticks != "0");
    ticks && value(info, "it_interval:").is_some_and(|interval| interval != "(0, 0)")
}

fn value<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn semaphores_and_plain_eventfds_are_told_apart() {
        let info = |semaphore| {
            format!("pos:\t0\nflags:\t02\neventfd-count:  1\neventfd-semaphore: {semaphore}\n")
        };
        assert!(is_semaphore(&info(1)) && !is_semaphore(&info(0)) && !is_semaphore("pos:\t0\n"));
    }

    #[test]
    fn only_a_periodic_timer_that_was_not_read_stands_still() {
        let info = |ticks, interval| {
            format!(
                "clockid: 1\nticks: {ticks}\nsettime flags: 00\nit_value: (0, 5)\nit_interval: {interval}\n"
            )
        };
        assert!(is_unread_timer(&info(3, "(0, 5)")));
        assert!(!is_unread_timer(&info(0, "(0, 5)")) && !is_unread_timer(&info(3, "(0, 0)")));
        assert!(!is_unread_timer("pos:\t0\n"));
    }
}
