//! Sorted values → their quantiles.

/// The value below which the fraction `q` of sorted values lies; between two of them in proportion.
pub fn quantile(sorted: &[f64], q: f64) -> f64 {
    let last = sorted.len() - 1;
    let at = q * last as f64;
    let (below, above) = (at.floor() as usize, (at.ceil() as usize).min(last));
    sorted[below] + (sorted[above] - sorted[below]) * at.fract()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_of_two_lies_between_them() {
        assert_eq!(quantile(&[1.0, 3.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.5), 2.0);
        assert_eq!(quantile(&[1.0, 3.0], 0.99), 2.98);
        assert_eq!((quantile(&[5.0], 0.99), quantile(&[1.0, 3.0], 1.0)), (5.0, 3.0));
    }
}
