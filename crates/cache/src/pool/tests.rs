use proptest::prelude::*;

use super::*;

#[test]
fn slots_are_distinct_and_come_back() {
    let mut pool = BlockPool::new(64 << 10, 1024);
    let class = pool.class(1024);
    let slots: Vec<SlotId> = std::iter::from_fn(|| pool.allocate(class).ok()).collect();
    assert_eq!(slots.len(), 64);
    assert!(!pool.can_allocate(&[(class, 1)], 0));
    for (i, slot) in slots.iter().enumerate() {
        pool.bytes_mut(*slot).unwrap().fill(i as u8);
    }
    for (i, slot) in slots.iter().enumerate() {
        assert!(pool.bytes(*slot).iter().all(|b| *b == i as u8));
    }
    pool.check().unwrap();
    for slot in slots {
        pool.release(slot).unwrap();
    }
    pool.check().unwrap();
    assert_eq!((pool.physical_bytes(), pool.reserved_bytes()), (0, 0));
}

#[test]
fn shared_slots_are_immutable_and_live_until_the_last_release() {
    let mut pool = BlockPool::new(1 << 20, 256);
    let class = pool.class(256);
    let slot = pool.allocate(class).unwrap();
    pool.retain(slot).unwrap();
    assert!(pool.bytes_mut(slot).is_err());
    pool.release(slot).unwrap();
    assert!(pool.bytes_mut(slot).is_ok());
    pool.release(slot).unwrap();
    assert!(pool.release(slot).is_err());
    assert!(pool.retain(slot).is_err());
    assert!(pool.bytes(slot).is_empty());
}

#[test]
fn an_empty_slab_serves_another_size() {
    let mut pool = BlockPool::new(4096, 4096);
    let (small, large) = (pool.class(1024), pool.class(4096));
    let slot = pool.allocate(small).unwrap();
    assert!(pool.allocate(large).is_err());
    pool.release(slot).unwrap();
    assert!(pool.allocate(large).is_ok());
}

#[test]
fn metadata_counts_against_the_budget() {
    let mut pool = BlockPool::new(8192, 4096);
    let class = pool.class(4096);
    pool.charge_metadata(4097).unwrap();
    assert!(pool.allocate(class).is_err());
    pool.discharge_metadata(1);
    assert!(pool.allocate(class).is_ok());
    assert!(pool.charge_metadata(1).is_err());
}

#[derive(Debug, Clone)]
enum Op {
    Allocate(usize),
    Retain(usize),
    Release(usize),
    Charge(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (0..3usize).prop_map(Op::Allocate),
        1 => (0..64usize).prop_map(Op::Retain),
        3 => (0..64usize).prop_map(Op::Release),
        1 => (0..500usize).prop_map(Op::Charge),
    ]
}

proptest! {
    /// The pool against a list of live references.
    #[test]
    fn any_order_of_operations_adds_up(ops in prop::collection::vec(op(), 1..300)) {
        let mut pool = BlockPool::new(40_000, 2048);
        let classes = [pool.class(512), pool.class(2048), pool.class(96)];
        let mut live: Vec<SlotId> = Vec::new();
        let mut charged = 0;
        for op in ops {
            match op {
                Op::Allocate(class) => {
                    let fits = pool.can_allocate(&[(classes[class], 1)], 0);
                    let got = pool.allocate(classes[class]);
                    prop_assert_eq!(fits, got.is_ok());
                    if let Ok(slot) = got {
                        prop_assert!(!live.contains(&slot));
                        live.push(slot);
                    }
                }
                Op::Retain(i) if !live.is_empty() => {
                    let slot = live[i % live.len()];
                    pool.retain(slot).unwrap();
                    live.push(slot);
                }
                Op::Release(i) if !live.is_empty() => {
                    let slot = live.swap_remove(i % live.len());
                    pool.release(slot).unwrap();
                }
                Op::Charge(bytes) if pool.charge_metadata(bytes).is_ok() => charged += bytes,
                _ => {}
            }
            pool.check().unwrap();
            prop_assert_eq!(pool.num_references(), live.len());
            let mut distinct = live.clone();
            distinct.sort_unstable();
            distinct.dedup();
            let bytes: usize = distinct.iter().map(|s| pool.size_of(*s)).sum();
            prop_assert_eq!(pool.physical_bytes(), bytes + charged);
        }
        pool.discharge_metadata(charged);
        for slot in live {
            pool.release(slot).unwrap();
        }
        prop_assert_eq!(pool.reserved_bytes(), 0);
    }
}
