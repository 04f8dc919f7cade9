//! Against values of the reference implementation (`scripts/make_dequant_fixtures.py`).

use std::path::Path;

use super::*;
use crate::gguf::GgufFile;
use crate::source::TensorSource;

const READABLE: [GgmlType; 16] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q8_0,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
    GgmlType::IQ4_NL,
    GgmlType::IQ4_XS,
    GgmlType::MXFP4,
];

fn fixture() -> GgufFile {
    let bytes = include_bytes!("fixtures/all_types.gguf");
    GgufFile::from_bytes(bytes.to_vec(), Path::new("all_types.gguf")).unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_type_equals_the_reference_to_the_bit() {
    let file = fixture();
    for ty in READABLE {
        assert_eq!(file.tensor(ty.name()).unwrap().ty, ty);
        let expected = file.read_f32(&format!("{ty}.expected")).unwrap();
        assert!(expected.len() >= 64 && expected.iter().any(|v| *v != 0.0), "{ty}");
        let found = file.read_f32(ty.name()).unwrap();
        assert_eq!(bits(&found), bits(&expected), "{ty}");
    }
    assert_eq!(file.tensors().len(), 2 * READABLE.len());
}

#[test]
fn parts_that_start_at_a_block_equal_the_whole() {
    let file = fixture();
    for ty in READABLE {
        let bytes = file.tensor_bytes(ty.name()).unwrap();
        let whole = file.read_f32(ty.name()).unwrap();
        let mut out = vec![f32::NAN; ty.block_elements()];
        let last = bytes.len() - ty.block_bytes();
        dequantize_into("x", ty, &bytes[last..], &mut out).unwrap();
        assert_eq!(bits(&out), bits(&whole[whole.len() - out.len()..]), "{ty}");
    }
}

#[test]
fn f16_of_any_length_and_alignment() {
    let values: Vec<f16> = (0..1000).map(|i| f16::from_f32(i as f32 / 8.0)).collect();
    let mut bytes = vec![0u8];
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    for len in [0, 1, 255, 256, 257, 1000] {
        let found = dequantize("x", GgmlType::F16, &bytes[1..=2 * len]).unwrap();
        let expected: Vec<f32> = values[..len].iter().map(|v| v.to_f32()).collect();
        assert_eq!(found, expected);
    }
}

#[test]
fn errors_name_tensor_and_type() {
    let error = dequantize("blk.0.attn_q.weight", GgmlType::IQ2_S, &[0; 82]).unwrap_err();
    assert!(matches!(error, ModelError::TensorType { .. }));
    let message = error.to_string();
    assert!(message.contains("blk.0.attn_q.weight") && message.contains("IQ2_S"), "{message}");

    let error = dequantize("x", GgmlType::Q4_K, &[0; 143]).unwrap_err();
    assert!(error.to_string().contains("143 bytes"), "{error}");

    let error = dequantize_into("x", GgmlType::Q8_0, &[0; 34], &mut [0.0; 31]).unwrap_err();
    assert!(matches!(error, ModelError::TensorShape { .. }), "{error}");
}

#[test]
fn readable_is_what_the_fixture_covers() {
    for number in 0..64 {
        if let Some(ty) = GgmlType::from_number(number) {
            assert_eq!(ty.is_readable(), READABLE.contains(&ty), "{ty}");
        }
    }
}
