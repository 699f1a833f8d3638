//! From a camera's array, JPEG or PNG in an observation to the square 8-bit RGB image the model
//! reads.

mod bilinear;
mod encoded;
mod pillow;

pub use bilinear::{resize_with_pad as resize_with_pad_unfiltered, stretch};
pub use encoded::{Decoded, Encoding, MAX_PIXELS};
pub use pillow::resize_with_pad;

use crate::config::Processing;
use crate::error::{PolicyError, python_tuple};
use crate::value::{NdArray, Scalar, Value};
use bytes::Bytes;
use half::f16;
use std::ops::RangeInclusive;

/// Longest side of an image accepted; keeps Pillow's fixed-point sums inside 32 bits.
pub const MAX_SIDE: usize = 1 << 16;
/// A float image is meant to be within [0, 1]. Resizing filters overshoot: OpenCV's bicubic one by
/// 0.45 at most, whatever the picture. On other scales, [-1, 1] or 0 to 255, only pictures without
/// dark pixels stay within this.
const FLOAT_RANGE: RangeInclusive<f64> = -0.5..=1.5;

/// Where the channel axis of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Channels first if the first axis has length 3, else last (DROID, LIBERO).
    Auto,
    /// `[height, width, 3]`.
    Hwc,
    /// `[3, height, width]` (ALOHA).
    Chw,
}

/// One camera's image, `[height, width, 3]` row-major, of any size.
#[derive(Clone, Debug, PartialEq)]
pub struct CameraImage {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Colours.
    pub pixels: Pixels,
}

/// Colours of an image.
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// 0 to 255.
    Bytes(Bytes),
    /// 0 to 1; LeRobot keeps floats until after the resize.
    Floats(Vec<f32>),
}

/// openpi's rule for a float pixel: 255·x in the array's own precision, truncated toward zero.
/// Outside of [0, 1] it wraps, as NumPy's cast does.
pub fn float_to_byte_f32(x: f32) -> u8 {
    (x * 255.0) as i32 as u8
}

/// As [`float_to_byte_f32`] in float64.
pub fn float_to_byte_f64(x: f64) -> u8 {
    (x * 255.0) as i32 as u8
}

/// As [`float_to_byte_f32`] in float16: the product is rounded to float16 before the truncation.
pub fn float_to_byte_f16(x: f16) -> u8 {
    f16::from_f32(x.to_f32() * 255.0).to_f32() as i32 as u8
}

impl CameraImage {
    /// Reads the image at `key`: an array of uint8 or floats, or the bytes of a JPEG or PNG file
    /// (as bytes or as a one-dimensional uint8 array; the file says where its channels are). An
    /// array of bytes that already lies as the model wants it is not copied.
    pub fn parse(
        value: &Value,
        key: &str,
        layout: Layout,
        processing: Processing,
    ) -> Result<CameraImage, PolicyError> {
        let expected = schema(layout);
        if let Some(bytes) = file_bytes(value) {
            return decode(&bytes, key, &expected);
        }
        let Some(array) = value.to_array() else {
            return Err(PolicyError::wrong_type(
                format!("'{key}' is no image array but {}", value.python_type()),
                format!("'{key}' must be {expected}"),
            ));
        };
        let &[a, b, c] = array.shape.as_slice() else {
            return Err(PolicyError::value(
                format!("'{key}' has shape {}", python_tuple(&array.shape, ", ")),
                format!("'{key}' must be {expected}, one image without a batch axis"),
            ));
        };
        let channels_first = match layout {
            Layout::Auto => a == 3,
            Layout::Hwc => false,
            Layout::Chw => true,
        };
        let (height, width, channels) = if channels_first { (b, c, a) } else { (a, b, c) };
        if channels != 3 || !(array.dtype == Scalar::U8 || array.dtype.is_float()) {
            return Err(cannot_handle(key, &array, channels, &expected));
        }
        if [height, width].iter().any(|side| !(1..=MAX_SIDE).contains(side)) {
            return Err(PolicyError::value(
                "height and width must be > 0".to_string(),
                format!("'{key}' is {height} × {width} pixels; each must be 1 to {MAX_SIDE}"),
            ));
        }
        let pixels = if array.dtype == Scalar::U8 {
            Pixels::Bytes(array.data.clone())
        } else if processing == Processing::Lerobot {
            Pixels::Floats(checked_floats(&array, key)?.iter().map(|&x| x as f32).collect())
        } else {
            Pixels::Bytes(quantise(&array, key)?.into())
        };
        let pixels = match pixels {
            Pixels::Bytes(bytes) if channels_first => Pixels::Bytes(interleave(&bytes).into()),
            Pixels::Floats(floats) if channels_first => Pixels::Floats(interleave(&floats)),
            as_is => as_is,
        };
        Ok(CameraImage { height, width, pixels })
    }

    /// The image as the model's square of `side` × `side` × 3 bytes. An image of that size passes
    /// unchanged. `key` is for messages.
    ///
    /// LeRobot feeds the resized floats to the model; here they are rounded to the nearest of 256
    /// levels, which moves a pixel by at most 0.5/255 (of a range from 0 to 1).
    pub fn fit(
        &self,
        key: &str,
        side: usize,
        processing: Processing,
    ) -> Result<Bytes, PolicyError> {
        let same = (self.height, self.width) == (side, side);
        let (from, to) = ((self.height, self.width), (side, side));
        let fitted = match (&self.pixels, processing) {
            (Pixels::Bytes(bytes), _) if same => return Ok(bytes.clone()),
            (Pixels::Bytes(bytes), Processing::Openpi) => resize_with_pad(bytes, from, to),
            (Pixels::Bytes(bytes), Processing::Lerobot) => {
                let floats: Vec<f32> = bytes.iter().map(|&b| f32::from(b) / 255.0).collect();
                resize_with_pad_unfiltered(&floats, from, to).map(|f| to_bytes(&f))
            }
            (Pixels::Floats(floats), _) if same => Some(to_bytes(floats)),
            (Pixels::Floats(floats), _) => {
                resize_with_pad_unfiltered(floats, from, to).map(|f| to_bytes(&f))
            }
        };
        fitted.map(Bytes::from).ok_or_else(|| {
            PolicyError::value(
                "height and width must be > 0".to_string(),
                format!(
                    "'{key}' is {} × {} pixels, so lopsided that nothing is left of it at \
                     {side} × {side}",
                    self.height, self.width
                ),
            )
        })
    }
}

/// Size after scaling `from` (height, width) to fit into `to`: openpi's float64 arithmetic,
/// which for some sizes leaves the long side one short. `None` if a side would vanish.
fn fitted_size(from: (usize, usize), to: (usize, usize)) -> Option<(usize, usize)> {
    let (height, width) = (from.0 as f64, from.1 as f64);
    let ratio = (width / to.1 as f64).max(height / to.0 as f64);
    let (rows, columns) = ((height / ratio) as usize, (width / ratio) as usize);
    (rows > 0 && columns > 0).then(|| (rows.min(to.0), columns.min(to.1)))
}

/// The bytes of a value that can only be an encoded image: raw bytes, or a one-dimensional uint8
/// array that begins like a JPEG or PNG file.
fn file_bytes(value: &Value) -> Option<Bytes> {
    match value {
        Value::Bytes(bytes) => Some(bytes.clone()),
        Value::Array(NdArray { dtype: Scalar::U8, shape, data })
            if shape.len() == 1 && Encoding::of(data).is_some() =>
        {
            Some(data.clone())
        }
        _ => None,
    }
}

fn decode(bytes: &[u8], key: &str, expected: &str) -> Result<CameraImage, PolicyError> {
    let Some(encoding) = Encoding::of(bytes) else {
        return Err(PolicyError::value(
            format!("'{key}' is {} bytes that are no JPEG and no PNG", bytes.len()),
            format!("'{key}' must be {expected}"),
        ));
    };
    let decoded = encoding.decode(bytes).map_err(|problem| {
        let name = encoding.name();
        let remedy = format!("'{key}' must be a complete {name} file, or {expected}");
        PolicyError::value(format!("'{key}' is a {name} that can't be read: {problem}"), remedy)
    })?;
    let Decoded { height, width, rgb } = decoded;
    Ok(CameraImage { height, width, pixels: Pixels::Bytes(rgb.into()) })
}

fn schema(layout: Layout) -> String {
    let shape = match layout {
        Layout::Auto => "[height, width, 3] or [3, height, width]",
        Layout::Hwc => "[height, width, 3]",
        Layout::Chw => "[3, height, width] (channels first)",
    };
    format!("an image {shape}, uint8 or float in [0, 1], or the bytes of a JPEG or PNG file")
}

/// Pillow's complaint about an array that is no RGB image.
fn cannot_handle(key: &str, array: &NdArray, channels: usize, expected: &str) -> PolicyError {
    let dtype = array.dtype.type_string();
    PolicyError::wrong_type(
        format!("Cannot handle this data type: (1, 1, {channels}), {dtype}"),
        format!(
            "'{key}' has shape {} and type {dtype}; it must be {expected}",
            python_tuple(&array.shape, ", ")
        ),
    )
}

/// The floats of an image array, refused if they can't be colours.
fn checked_floats(array: &NdArray, key: &str) -> Result<Vec<f64>, PolicyError> {
    let floats = array.to_f64().unwrap_or_default();
    match floats.iter().find(|x| !FLOAT_RANGE.contains(x)) {
        None => Ok(floats),
        Some(x) => Err(PolicyError::value(
            format!("'{key}' contains the pixel value {x}"),
            format!("send '{key}' as uint8, or as floats in [0, 1]"),
        )),
    }
}

fn quantise(array: &NdArray, key: &str) -> Result<Vec<u8>, PolicyError> {
    let floats = checked_floats(array, key)?;
    Ok(match array.dtype {
        Scalar::F16 => floats.iter().map(|&x| float_to_byte_f16(f16::from_f64(x))).collect(),
        Scalar::F32 => floats.iter().map(|&x| float_to_byte_f32(x as f32)).collect(),
        _ => floats.iter().map(|&x| float_to_byte_f64(x)).collect(),
    })
}

/// Three planes to pixels of three.
fn interleave<T: Copy>(planes: &[T]) -> Vec<T> {
    let (red, rest) = planes.split_at(planes.len() / 3);
    let (green, blue) = rest.split_at(rest.len() / 2);
    let mut pixels = planes.to_vec();
    let colours = red.iter().zip(green).zip(blue);
    for (pixel, ((&r, &g), &b)) in pixels.as_chunks_mut::<3>().0.iter_mut().zip(colours) {
        *pixel = [r, g, b];
    }
    pixels
}

/// [0, 1] to the nearest of 256 levels.
fn to_bytes(floats: &[f32]) -> Vec<u8> {
    floats.iter().map(|x| (x.clamp(0.0, 1.0) * 255.0).round() as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(dtype: Scalar, shape: &[usize], data: Vec<u8>) -> Value {
        Value::Array(NdArray { dtype, shape: shape.to_vec(), data: data.into() })
    }

    fn parse(value: &Value, layout: Layout) -> Result<CameraImage, PolicyError> {
        CameraImage::parse(value, "cam", layout, Processing::Openpi)
    }

    #[test]
    fn floats_truncate() {
        assert_eq!([0.0, 0.5, 0.9999, 1.0].map(float_to_byte_f64), [0, 127, 254, 255]);
        assert_eq!(float_to_byte_f32(-0.001), 0);
        assert_eq!(float_to_byte_f32(1.01), 1);
        assert_eq!(float_to_byte_f16(f16::from_f32(1.0)), 255);
    }

    #[test]
    fn only_the_first_axis_decides_the_layout() {
        let chw: Vec<u8> = (0..24).collect();
        let image = parse(&array(Scalar::U8, &[3, 2, 4], chw.clone()), Layout::Auto).unwrap();
        assert_eq!((image.height, image.width), (2, 4));
        let Pixels::Bytes(pixels) = image.pixels else { panic!("bytes") };
        assert_eq!(pixels[..6], [0, 8, 16, 1, 9, 17]);
        let image = parse(&array(Scalar::U8, &[2, 4, 3], chw.clone()), Layout::Auto).unwrap();
        assert_eq!((image.height, image.width), (2, 4));
        // An HWC image three rows high is misread, as in openpi: its width becomes the height.
        let error = parse(&array(Scalar::U8, &[4, 2, 3], chw), Layout::Chw).unwrap_err();
        assert_eq!(error.message(), "Cannot handle this data type: (1, 1, 4), |u1");
        assert!(error.remedy().contains("channels first"), "{error}");
    }

    #[test]
    fn wrong_arrays_are_named() {
        let ints = array(Scalar::I64, &[1, 1, 3], vec![0; 24]);
        let error = parse(&ints, Layout::Auto).unwrap_err();
        assert_eq!(error.exception(), "TypeError");
        assert_eq!(error.message(), "Cannot handle this data type: (1, 1, 3), <i8");
        let batch = array(Scalar::U8, &[1, 1, 1, 3], vec![0; 3]);
        assert!(parse(&batch, Layout::Auto).unwrap_err().message().contains("(1, 1, 1, 3)"));
        assert!(parse(&Value::Nil, Layout::Auto).unwrap_err().message().contains("NoneType"));
        let empty = array(Scalar::U8, &[0, 5, 3], vec![]);
        assert!(parse(&empty, Layout::Auto).is_err());
        let floats = |x: f32| {
            let data = [0.0, x, 1.0].iter().flat_map(|x| x.to_le_bytes()).collect();
            parse(&array(Scalar::F32, &[1, 1, 3], data), Layout::Auto)
        };
        for bad in [f32::NAN, f32::INFINITY, 200.0, 1.51, -0.51, -1.0] {
            let error = floats(bad).unwrap_err();
            assert!(error.message().contains("'cam' contains the pixel value"), "{error}");
        }
        for overshoot in [-0.45, 1.45] {
            assert!(floats(overshoot).is_ok(), "{overshoot}");
        }
    }

    #[test]
    fn files_are_read_in_any_layout_and_named_when_they_are_broken() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let file = std::fs::read(folder.join("../../testdata/G_images/camera.png")).unwrap();
        let flat = array(Scalar::U8, &[file.len()], file.clone());
        let bytes = Value::Bytes(file.clone().into());
        for layout in [Layout::Auto, Layout::Hwc, Layout::Chw] {
            let image = parse(&bytes, layout).unwrap();
            assert_eq!((image.height, image.width), (40, 56));
            assert_eq!(image, parse(&flat, layout).unwrap());
        }
        let cut = Value::Bytes(file[..file.len() / 2].to_vec().into());
        let error = parse(&cut, Layout::Auto).unwrap_err();
        assert!(error.message().starts_with("'cam' is a PNG that can't be read: "), "{error}");
        let other = Value::Bytes(Bytes::from_static(b"GIF89a"));
        let error = parse(&other, Layout::Auto).unwrap_err();
        assert_eq!(error.message(), "'cam' is 6 bytes that are no JPEG and no PNG");
        // Not a file: what was said about such an array before is still said.
        let error = parse(&array(Scalar::U8, &[6], vec![0; 6]), Layout::Auto).unwrap_err();
        assert_eq!(error.message(), "'cam' has shape (6,)");
    }

    #[test]
    fn an_image_of_the_right_size_is_not_copied() {
        let data = Bytes::from(vec![7; 4 * 4 * 3]);
        let value =
            Value::Array(NdArray { dtype: Scalar::U8, shape: vec![4, 4, 3], data: data.clone() });
        let fitted = parse(&value, Layout::Auto).unwrap().fit("cam", 4, Processing::Openpi);
        assert_eq!(fitted.unwrap().as_ptr(), data.as_ptr());
    }

    #[test]
    fn a_line_of_pixels_is_refused() {
        let line = array(Scalar::U8, &[1, 1000, 3], vec![0; 3000]);
        let image = parse(&line, Layout::Auto).unwrap();
        let error = image.fit("cam", 224, Processing::Openpi).unwrap_err();
        assert_eq!(error.message(), "height and width must be > 0");
    }

    #[test]
    fn the_long_side_can_be_one_short() {
        assert_eq!(fitted_size((480, 640), (224, 224)), Some((168, 224)));
        assert_eq!(fitted_size((150, 225), (224, 224)).map(|size| size.1), Some(223));
        assert_eq!(fitted_size((376, 672), (224, 224)), Some((125, 224)));
    }
}
