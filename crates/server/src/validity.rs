//! A certificate's DER → the time in which it is valid. As much of X.509 as that takes.

/// From and until, in seconds since 1970. `None`: this is no certificate one can read.
pub(crate) fn validity(certificate: &[u8]) -> Option<[i64; 2]> {
    // Certificate ⊃ TBSCertificate: [version], serial, algorithm, issuer, validity, …
    let (SEQUENCE, certificate, _) = element(certificate)? else { return None };
    let (SEQUENCE, mut rest, _) = element(certificate)? else { return None };
    if let (VERSION, _, after) = element(rest)? {
        rest = after;
    }
    for _ in 0..3 {
        rest = element(rest)?.2;
    }
    let (SEQUENCE, times, _) = element(rest)? else { return None };
    let (tag, from, times) = element(times)?;
    let from = seconds(tag, from)?;
    let (tag, until, _) = element(times)?;
    Some([from, seconds(tag, until)?])
}

const SEQUENCE: u8 = 0x30;
const VERSION: u8 = 0xa0;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;

/// Tag and content of the first element, and what follows it.
fn element(der: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, first], rest) = der.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        short @ 0..=0x7f => (usize::from(short), rest),
        long @ 0x81..=0x84 => {
            let (bytes, rest) = rest.split_at_checked(usize::from(long & 0x7f))?;
            (bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b)), rest)
        }
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(length)?;
    Some((tag, content, rest))
}

/// `YYMMDDhhmmssZ` or `YYYYMMDDhhmmssZ` (RFC 5280, 4.1.2.5).
fn seconds(tag: u8, text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (year, rest) = match (tag, text.len()) {
        (UTC_TIME, 12) => {
            let year: i64 = text[..2].parse().ok()?;
            (if year < 50 { 2000 + year } else { 1900 + year }, &text[2..])
        }
        (GENERALIZED_TIME, 14) => (text[..4].parse().ok()?, &text[4..]),
        _ => return None,
    };
    let part = |i: usize| rest[2 * i..2 * i + 2].parse::<i64>().ok();
    let (month, day) = (part(0)?, part(1)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    Some(days(year, month, day) * 86_400 + part(2)? * 3600 + part(3)? * 60 + part(4)?)
}

/// Days from 1970-01-01 in the Gregorian calendar, years counted from March.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leaps = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    365 * year + leaps + (153 * month + 2) / 5 + day - 1 - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_time() {
        assert_eq!(seconds(UTC_TIME, b"700101000000Z"), Some(0));
        assert_eq!(seconds(UTC_TIME, b"491231235959Z"), Some(2_524_607_999));
        assert_eq!(seconds(GENERALIZED_TIME, b"20000229120000Z"), Some(951_825_600));
        assert_eq!(seconds(GENERALIZED_TIME, b"21200101000000Z"), Some(4_733_510_400));
        for (tag, wrong) in [
            (UTC_TIME, &b"20000229120000Z"[..]),
            (GENERALIZED_TIME, b"20001301000000Z"),
            (GENERALIZED_TIME, b"20000229120000"),
            (GENERALIZED_TIME, b"+0000229120000Z"),
            (SEQUENCE, b"700101000000Z"),
        ] {
            assert_eq!(seconds(tag, wrong), None);
        }
    }

    #[test]
    fn cut_certificates_are_refused() {
        let times = [&[SEQUENCE, 30][..], &[UTC_TIME, 13], b"700101000000Z", &[UTC_TIME, 13]];
        let times = [&times.concat()[..], b"700102000000Z"].concat();
        let fields = [&[VERSION, 1, 2, 2, 1, 9, SEQUENCE, 0, SEQUENCE, 0][..], &times].concat();
        let tbs = [&[SEQUENCE, fields.len() as u8][..], &fields].concat();
        let certificate = [&[SEQUENCE, 0x81, tbs.len() as u8][..], &tbs].concat();
        assert_eq!(validity(&certificate), Some([0, 86_400]));
        for n in 0..certificate.len() {
            assert_eq!(validity(&certificate[..n]), None);
        }
        assert_eq!(validity(&[SEQUENCE, 0x84, 0xff, 0xff, 0xff, 0xff]), None);
    }
}
