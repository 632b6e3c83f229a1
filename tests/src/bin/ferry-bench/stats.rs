//! Percentiles by nearest rank: each figure is one that was measured.

use serde::Serialize;

/// What is told of a figure that was measured several times. Its unit is that of the values.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Summary {
    /// How many values there are.
    pub(crate) count: usize,
    /// The smallest.
    pub(crate) min: f64,
    /// Half of the values are not above it.
    pub(crate) p50: f64,
    /// 95 of 100 are not above it.
    pub(crate) p95: f64,
    /// 99 of 100 are not above it.
    pub(crate) p99: f64,
    /// The greatest.
    pub(crate) max: f64,
}

impl Summary {
    /// The summary of `values`; none when there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let [p50, p95, p99] = [50, 95, 99].map(|percent| rank(&sorted, percent));
        Some(Self { count: sorted.len(), min, p50, p95, p99, max })
    }
}

/// The value that `percent` of the values are not above. There is at least one.
fn rank(sorted: &[f64], percent: usize) -> f64 {
    let place = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[place - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_values_that_were_measured() {
        let hundred = Summary::of((1..=100).rev().map(f64::from)).unwrap();
        assert_eq!((hundred.min, hundred.p50, hundred.p95), (1.0, 50.0, 95.0));
        assert_eq!((hundred.p99, hundred.max, hundred.count), (99.0, 100.0, 100));

        let four = Summary::of([40.0, 10.0, 30.0, 20.0]).unwrap();
        assert_eq!((four.p50, four.p95, four.p99), (20.0, 40.0, 40.0));
    }

    #[test]
    fn one_value_is_every_figure_and_no_value_is_none() {
        let one = Summary::of([7.5]).unwrap();
        assert_eq!((one.min, one.p50, one.p99, one.max), (7.5, 7.5, 7.5, 7.5));
        assert_eq!(Summary::of([]), None);
    }
}
