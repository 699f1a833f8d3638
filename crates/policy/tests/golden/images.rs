//! Pillow's resize bit for bit, float images, torch's unfiltered resize.

use crate::fixture::{self, Tensors, assert_exact, relative_difference};
use pirouette_policy::image::{
    float_to_byte_f32, float_to_byte_f64, resize_with_pad, resize_with_pad_unfiltered,
};

/// Every file with its target size: `NN_<h>x<w>_to_<H>x<W>.safetensors`.
fn cases() -> Vec<(String, (usize, usize))> {
    let names = fixture::list("D_preprocess/images");
    names
        .into_iter()
        .filter(|name| name.starts_with(|c: char| c.is_ascii_digit()))
        .filter_map(|name| {
            let (_, size) = name.strip_suffix(".safetensors")?.split_once("_to_")?;
            let (height, width) = size.split_once('x').unwrap();
            let size = (height.parse().unwrap(), width.parse().unwrap());
            Some((format!("D_preprocess/images/{name}"), size))
        })
        .collect()
}

#[test]
fn pillow_bit_for_bit() {
    let cases = cases();
    assert_eq!(cases.len(), 14);
    for (file, to) in cases {
        let tensors = Tensors::open(&file);
        let image = tensors.array("in.uint8_hwc");
        let expected = tensors.array("out.client_pil_uint8");
        let actual = resize_with_pad(&image.data, (image.shape[0], image.shape[1]), to).unwrap();
        let wrong = actual.iter().zip(&expected.data).filter(|(a, e)| a != e).count();
        assert_eq!((actual.len(), wrong), (expected.data.len(), 0), "{file}");
    }
}

#[test]
fn unfiltered_as_torch() {
    let mut compared = 0;
    for (file, to) in cases() {
        let tensors = Tensors::open(&file);
        let Some(expected) = tensors.find("out.torch_float32") else { continue };
        let image = tensors.array("in.uint8_hwc");
        let floats: Vec<f32> = image.data.iter().map(|&b| f32::from(b) / 255.0).collect();
        let from = (image.shape[0], image.shape[1]);
        let actual = resize_with_pad_unfiltered(&floats, from, to).unwrap();
        // The fixture's images were scaled to [-1, 1] before.
        let actual: Vec<f64> = actual.iter().map(|&a| f64::from(a) * 2.0 - 1.0).collect();
        let difference = relative_difference(&actual, &expected.to_f64().unwrap());
        assert!(difference < 2e-6, "{file}: {difference:e}");
        compared += 1;
    }
    assert_eq!(compared, 4);
}

#[test]
fn floats_become_bytes_as_in_the_client() {
    let tensors = Tensors::open("D_preprocess/images/convert_to_uint8.safetensors");
    let (f32s, f64s) = (tensors.numbers("in.f32"), tensors.numbers("in.f64"));
    let actual: Vec<f64> = f32s.iter().map(|&x| float_to_byte_f32(x as f32).into()).collect();
    assert_exact("f32", &actual, &tensors.numbers("out.u8_from_f32"));
    let actual: Vec<f64> = f64s.iter().map(|&x| float_to_byte_f64(x).into()).collect();
    assert_exact("f64", &actual, &tensors.numbers("out.u8_from_f64"));
}
