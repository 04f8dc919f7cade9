//! Runs one kernel a number of times: what `scripts/instructions.py` counts instructions of.
//!
//! `cargo run --release -p kvasir-kernels --example instructions -- NAME TIMES`, or `list` for the names.
#![allow(clippy::print_stdout)]

use std::hint::black_box;

use kvasir_kernels::ActivationKind::{Bf16, Bytes};
use kvasir_kernels::trellis::Layout;
use kvasir_kernels::{
    ActivationKind, Activations, CodeFormat, GroupCodes, Linear, RopeScaling, RopeTable, argmax,
    rms_norm, rotate,
};

/// A kernel and its operands.
type Kernel = Box<dyn FnMut()>;

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 2003) as f32 / 1001.0 - 1.0).collect()
}

fn linear(kind: ActivationKind, format: Option<CodeFormat>, rows: usize) -> Kernel {
    const INPUTS: usize = 256;
    const OUTPUTS: usize = 128;
    let coded = format.and_then(|format| {
        let fill = |row: usize, _: usize, groups: &mut [GroupCodes]| {
            for group in groups {
                group.scale = 0.01;
                group.codes = std::array::from_fn(|i| ((row + i) % 16) as i8 + format.lowest);
            }
        };
        let fill = |_: std::ops::Range<usize>| Ok::<_, ()>(fill);
        Linear::from_codes((format, kind), None, INPUTS, OUTPUTS, fill).ok().flatten()
    });
    let linear = coded
        .unwrap_or_else(|| Linear::bf16(kind, &numbers(INPUTS * OUTPUTS), None, INPUTS, OUTPUTS));
    let mut x = Activations::default();
    x.set(kind, &numbers(rows * INPUTS), INPUTS);
    let mut out = vec![0.0; rows * OUTPUTS];
    Box::new(move || linear.forward(&x, black_box(&mut out)))
}

fn trellis(decode: bool) -> Option<Kernel> {
    let layout = Layout::new(vec![3; 12], vec![1.0; 12])?;
    let z = numbers(32 * 192);
    let mut codes = vec![0; 32 * layout.row_bytes()];
    let (means, mut out) = (vec![0.0; 192], vec![0.0; z.len()]);
    Some(Box::new(move || {
        if decode {
            layout.decode(&codes, 32, 1.0, &means, 0, black_box(&mut out), 192);
        } else {
            layout.encode(&z, black_box(&mut codes));
        }
    }))
}

const NAMES: [&str; 12] = [
    "linear q4, 1 row",
    "linear q4, 32 rows",
    "linear q8, 1 row",
    "linear bf16, 32 rows",
    "linear q4 with bytes, 1 row",
    "linear q4 with bytes, 32 rows",
    "linear q8 with bytes, 32 rows",
    "RMS norm of 576",
    "RoPE of 64",
    "argmax of 49152",
    "trellis encode, 3 bits",
    "trellis decode, 3 bits",
];

fn kernel(name: &str) -> Option<Kernel> {
    let q4 = Some(CodeFormat { lowest: 0, bits: 4, has_min: true });
    let q8 = Some(CodeFormat { lowest: -128, bits: 8, has_min: false });
    let x = numbers(49152);
    Some(match NAMES.iter().position(|known| *known == name)? {
        0 => linear(Bf16, q4, 1),
        1 => linear(Bf16, q4, 32),
        2 => linear(Bf16, q8, 1),
        3 => linear(Bf16, None, 32),
        4 => linear(Bytes, q4, 1),
        5 => linear(Bytes, q4, 32),
        6 => linear(Bytes, q8, 32),
        7 => {
            let mut out = vec![0.0; 576];
            Box::new(move || rms_norm(&x[..576], &x[576..1152], 1e-5, black_box(&mut out)))
        }
        8 => {
            let table = RopeTable::new(64, 1e5, &RopeScaling::None, 8);
            let mut row = x[..64].to_vec();
            Box::new(move || {
                let (cos, sin) = table.at(7);
                rotate(black_box(&mut row), cos, sin);
            })
        }
        9 => Box::new(move || {
            black_box(argmax(black_box(&x)));
        }),
        10 => trellis(false)?,
        _ => trellis(true)?,
    })
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.as_slice() {
        [list] if list == "list" => NAMES.iter().for_each(|name| println!("{name}")),
        [name, times] => match (kernel(name), times.parse::<usize>()) {
            (Some(mut kernel), Ok(times)) => (0..times).for_each(|_| kernel()),
            _ => println!("no kernel {name:?}, or no number {times:?}"),
        },
        _ => println!("instructions NAME TIMES, or: instructions list"),
    }
}
