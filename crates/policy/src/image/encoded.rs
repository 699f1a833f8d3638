//! The bytes of a JPEG or PNG file → RGB pixels. Sizes are checked before anything is allocated.

use std::borrow::Cow;
use std::io::Cursor;

use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Most pixels of an encoded image: 4096 × 4096. A file of a few kilobytes may claim any size, so
/// this, not the length of the message, bounds what one image can cost.
pub const MAX_PIXELS: usize = 1 << 24;

/// Longest side of an encoded image. JPEG knows no longer one.
const MAX_ENCODED_SIDE: usize = (1 << 16) - 1;

/// What a PNG decoder may allocate besides the pixels (palettes, text, profiles).
const PNG_EXTRA_BYTES: usize = 1 << 20;

const JPEG_MAGIC: [u8; 3] = [0xFF, 0xD8, 0xFF];
const PNG_MAGIC: [u8; 8] = [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n'];

/// Markers of a Huffman table and of a scan.
const DHT: u8 = 0xC4;
const SOS: u8 = 0xDA;

/// A segment that says Motion JPEG: the decoder then knows the tables that are left out.
const MOTION_JPEG: [u8; 9] = [0xFF, 0xE0, 0, 7, b'A', b'V', b'I', b'1', 0];

/// An encoding this server reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Baseline or progressive; grey and CMYK become RGB. The orientation that a camera may have
    /// noted is ignored, as Pillow ignores it. A frame of Motion JPEG may lack the usual Huffman
    /// tables.
    Jpeg,
    /// Any PNG: grey and palettes become RGB, 16 bits lose the lower 8, transparency is dropped.
    Png,
}

/// Pixels of a decoded image, `[height, width, 3]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Red, green, blue, row-major.
    pub rgb: Vec<u8>,
}

impl Encoding {
    /// Tells the encoding from the first bytes of a file.
    pub fn of(bytes: &[u8]) -> Option<Encoding> {
        if bytes.starts_with(&JPEG_MAGIC) {
            Some(Encoding::Jpeg)
        } else if bytes.starts_with(&PNG_MAGIC) {
            Some(Encoding::Png)
        } else {
            None
        }
    }

    /// Its name, for messages.
    pub fn name(self) -> &'static str {
        match self {
            Encoding::Jpeg => "JPEG",
            Encoding::Png => "PNG",
        }
    }

    /// Decodes a whole file. Never panics, whatever the bytes.
    ///
    /// # Errors
    /// What is wrong with the file, in one line.
    pub fn decode(self, bytes: &[u8]) -> Result<Decoded, String> {
        match self {
            Encoding::Jpeg => jpeg(bytes),
            Encoding::Png => png(bytes),
        }
    }
}

/// Refuses sizes that no camera has.
fn sized(height: usize, width: usize) -> Result<(), String> {
    let sides = 1..=MAX_ENCODED_SIDE;
    let pixels = height.checked_mul(width);
    if sides.contains(&height) && sides.contains(&width) && pixels.is_some_and(|n| n <= MAX_PIXELS)
    {
        return Ok(());
    }
    Err(format!(
        "it is {height} × {width} pixels; at most {MAX_ENCODED_SIDE} a side and {MAX_PIXELS} in \
         all are accepted"
    ))
}

fn jpeg(bytes: &[u8]) -> Result<Decoded, String> {
    let options = DecoderOptions::default()
        .set_strict_mode(true)
        .set_max_width(MAX_ENCODED_SIDE)
        .set_max_height(MAX_ENCODED_SIDE)
        .jpeg_set_out_colorspace(ColorSpace::RGB);
    let bytes = match lacks_tables(bytes) {
        true => Cow::Owned([&bytes[..2], &MOTION_JPEG[..], &bytes[2..]].concat()),
        false => Cow::Borrowed(bytes),
    };
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(&bytes[..]), options);
    let wrong = |error: zune_jpeg::errors::DecodeErrors| one_line(&error.to_string());
    decoder.decode_headers().map_err(wrong)?;
    let (width, height) = decoder.dimensions().ok_or("it has no size")?;
    sized(height, width)?;
    let rgb = decoder.decode().map_err(wrong)?;
    complete(height, width, rgb)
}

/// Whether no Huffman table stands before the first scan, as in the frames of many cameras.
fn lacks_tables(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    loop {
        match rest {
            [0xFF, DHT, ..] => return false,
            [0xFF, SOS, ..] => return true,
            // Markers may be filled up with 0xFF.
            [0xFF, 0xFF, ..] => rest = &rest[1..],
            [0xFF, _, length @ ..] => {
                let Some(extent) = length.first_chunk::<2>().map(|b| u16::from_be_bytes(*b)) else {
                    return false;
                };
                let Some(next) = length.get(usize::from(extent)..) else { return false };
                rest = next;
            }
            _ => return false,
        }
    }
}

fn png(bytes: &[u8]) -> Result<Decoded, String> {
    let wrong = |error: png::DecodingError| one_line(&error.to_string());
    let limits = png::Limits { bytes: PNG_EXTRA_BYTES + MAX_PIXELS * 8 };
    let mut decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(png::Transformations::EXPAND | png::Transformations::STRIP_16);
    let head = decoder.read_header_info().map_err(wrong)?;
    let (height, width) = (head.height as usize, head.width as usize);
    sized(height, width)?;
    let mut reader = decoder.read_info().map_err(wrong)?;
    let size = reader.output_buffer_size().ok_or("it is too large")?;
    let mut pixels = vec![0; size];
    let frame = reader.next_frame(&mut pixels).map_err(wrong)?;
    pixels.truncate(frame.buffer_size());
    let rgb = match frame.color_type.samples() {
        1 => pixels.iter().flat_map(|&grey| [grey; 3]).collect(),
        2 => pixels.as_chunks::<2>().0.iter().flat_map(|&[grey, _]| [grey; 3]).collect(),
        3 => pixels,
        _ => pixels.as_chunks::<4>().0.iter().flat_map(|&[r, g, b, _]| [r, g, b]).collect(),
    };
    complete(height, width, rgb)
}

fn complete(height: usize, width: usize, rgb: Vec<u8>) -> Result<Decoded, String> {
    if rgb.len() == height * width * 3 {
        return Ok(Decoded { height, width, rgb });
    }
    Err(format!("it holds {} bytes of colours for {height} × {width} pixels", rgb.len()))
}

fn one_line(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn file(name: &str) -> Vec<u8> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../testdata/G_images");
        std::fs::read(folder.join(name)).unwrap()
    }

    fn decode(bytes: &[u8]) -> Result<Decoded, String> {
        Encoding::of(bytes).ok_or("no magic")?.decode(bytes)
    }

    /// Largest and mean difference of two images.
    fn difference(a: &Decoded, b: &Decoded) -> (u8, f64) {
        assert_eq!((a.height, a.width, a.rgb.len()), (b.height, b.width, b.rgb.len()));
        let each = || a.rgb.iter().zip(&b.rgb).map(|(x, y)| x.abs_diff(*y));
        let sum: f64 = each().map(f64::from).sum();
        (each().max().unwrap(), sum / a.rgb.len() as f64)
    }

    #[test]
    fn every_kind_of_png_is_the_picture_it_was_made_from() {
        let camera = decode(&file("camera.png")).unwrap();
        assert_eq!((camera.height, camera.width), (40, 56));
        assert_eq!(camera.rgb[(9 * 56 + 11) * 3..][..3], [200, 30, 40]);
        assert_eq!(decode(&file("alpha.png")).unwrap(), camera, "transparency is dropped");
        assert_eq!(decode(&file("deep.png")).unwrap(), camera, "16 bits lose the lower 8");
        assert_eq!(
            decode(&file("palette.png")).unwrap(),
            decode(&file("palette.rgb.png")).unwrap()
        );
        let grey = decode(&file("gray.png")).unwrap();
        assert!(grey.rgb.as_chunks::<3>().0.iter().all(|[r, g, b]| r == g && g == b));
        assert_ne!(grey, camera);
    }

    #[test]
    fn jpegs_are_what_pillow_reads() {
        // Decoders may round differently and smooth chroma differently; they stay this close.
        for (name, most, mean) in [
            ("full_chroma.jpg", 4, 0.6),
            ("gray.jpg", 2, 0.3),
            ("camera.jpg", 40, 1.5),
            ("progressive.jpg", 40, 1.5),
        ] {
            let ours = decode(&file(name)).unwrap();
            let pillows = decode(&file(&format!("{name}.rgb.png"))).unwrap();
            let (worst, average) = difference(&ours, &pillows);
            assert!(worst <= most && average <= mean, "{name}: {worst}, {average}");
        }
    }

    #[test]
    fn frames_of_motion_jpeg_leave_the_usual_tables_out() {
        for name in ["camera.jpg", "full_chroma.jpg", "gray.jpg"] {
            let whole = file(name);
            let mut bare = whole.clone();
            assert!(!lacks_tables(&bare), "{name}");
            while let Some(at) = bare.windows(2).position(|w| w == [0xFF, DHT]) {
                let length = usize::from(u16::from_be_bytes([bare[at + 2], bare[at + 3]]));
                bare.drain(at..at + 2 + length);
            }
            assert!(bare.len() < whole.len() && lacks_tables(&bare), "{name}");
            assert_eq!(decode(&bare), decode(&whole), "{name}");
            assert!(decode(&bare[..bare.len() / 2]).is_err(), "{name}");
            assert!((0..30).all(|end| !lacks_tables(&bare[..end])), "{name}");
        }
    }

    #[test]
    fn padding_after_the_end_is_no_fault() {
        // Drivers hand out whole buffers, of which the picture is the beginning.
        for name in ["camera.jpg", "progressive.jpg", "camera.png"] {
            let mut padded = file(name);
            let want = decode(&padded).unwrap();
            padded.extend([0; 300]);
            assert_eq!(decode(&padded), Ok(want), "{name}");
        }
    }

    #[test]
    fn broken_files_are_refused_in_one_line() {
        for name in ["camera.png", "camera.jpg", "progressive.jpg", "palette.png", "deep.png"] {
            let whole = file(name);
            for length in [8, 20, whole.len() / 2, whole.len() - 40] {
                let error = decode(&whole[..length]).expect_err(&format!("{name} {length}"));
                assert!(!error.is_empty() && !error.contains('\n'), "{name} {length}: {error}");
            }
        }
        assert_eq!(Encoding::of(b"GIF89a"), None);
        assert_eq!(Encoding::of(b""), None);
    }

    #[test]
    fn claimed_sizes_are_refused_before_memory_is_taken() {
        let mut png = file("camera.png");
        // IHDR: width and height after signature, length and type; a wrong checksum says so first.
        for (width, height) in [(0xFFFF_u32, 0xFFFF_u32), (0x1_0000, 1)] {
            png[16..20].copy_from_slice(&width.to_be_bytes());
            png[20..24].copy_from_slice(&height.to_be_bytes());
            let sum = crc(&png[12..29]);
            png[29..33].copy_from_slice(&sum.to_be_bytes());
            let error = decode(&png).unwrap_err();
            assert!(
                error.contains(&format!("{height} × {width} pixels; at most 65535")),
                "{error}"
            );
        }
        let mut jpeg = file("camera.jpg");
        let frame = jpeg.windows(2).position(|w| w == [0xFF, 0xC0]).unwrap();
        jpeg[frame + 5..frame + 9].copy_from_slice(&[0xFF, 0xF0, 0xFF, 0xF0]);
        let error = decode(&jpeg).unwrap_err();
        assert!(error.contains("65520 × 65520 pixels"), "{error}");
    }

    fn crc(bytes: &[u8]) -> u32 {
        let step = |c: u32, _| if c & 1 == 1 { 0xEDB8_8320 ^ (c >> 1) } else { c >> 1 };
        !bytes.iter().fold(!0u32, |c, b| (0..8).fold(c ^ u32::from(*b), step))
    }
}
