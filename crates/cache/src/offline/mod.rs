//! What methods need of a model before they can serve it: made once, kept in a file, the same for all requests.

mod compactor;
mod kv_sharer;
mod less;
mod low_rank;
mod squares;

pub use compactor::{CompactorTable, ContextWorth};
pub use kv_sharer::KvSharerTable;
pub(crate) use less::{FEATURES, Features};
pub use less::{LessOptions, LessSamples, LessTable, LessTraining};
pub use low_rank::{Axes, HeadGroup, LowRankTable};
pub use squares::Squares;

use std::sync::Arc;

use crate::error::{CacheError, Result};
use crate::geometry::Geometry;

/// What the numbers mean; part of every file. Raise it when that changes.
pub const TABLE_VERSION: u32 = 1;

/// Methods that need a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Method {
    /// LoRC: axes of the weights of keys and values.
    Lorc,
    /// ReCalKV: axes of keys and values over a corpus.
    ReCalKv,
    /// KVSharer: layers that may read another's keys and values.
    KvSharer,
    /// LESS: networks whose products are weights of attention.
    Less,
    /// Compactor, where the budget follows from the prompt: how much of a context's worth a share of it keeps.
    Compactor,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Lorc, Self::ReCalKv, Self::KvSharer, Self::Less, Self::Compactor];

    /// The method of a name.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.name() == name)
    }

    /// As in recipes and names of files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lorc => "lorc",
            Self::ReCalKv => "recalkv",
            Self::KvSharer => "kvsharer",
            Self::Less => "less",
            Self::Compactor => "compactor",
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A named array, as files hold it.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Unique in its table.
    pub name: String,
    /// Its sizes, outermost first.
    pub shape: Vec<usize>,
    /// Row by row.
    pub data: Vec<f32>,
}

/// What one method needs.
#[derive(Debug, Clone, PartialEq)]
pub enum Table {
    /// Of [`Method::Lorc`].
    Lorc(Arc<LowRankTable>),
    /// Of [`Method::ReCalKv`].
    ReCalKv(Arc<LowRankTable>),
    /// Of [`Method::KvSharer`].
    KvSharer(Arc<KvSharerTable>),
    /// Of [`Method::Less`].
    Less(Arc<LessTable>),
    /// Of [`Method::Compactor`].
    Compactor(CompactorTable),
}

impl Table {
    /// Whose it is.
    pub fn method(&self) -> Method {
        match self {
            Self::Lorc(_) => Method::Lorc,
            Self::ReCalKv(_) => Method::ReCalKv,
            Self::KvSharer(_) => Method::KvSharer,
            Self::Less(_) => Method::Less,
            Self::Compactor(_) => Method::Compactor,
        }
    }

    /// Everything in it.
    pub fn to_tensors(&self) -> Vec<Tensor> {
        match self {
            Self::Lorc(table) | Self::ReCalKv(table) => table.to_tensors(),
            Self::KvSharer(table) => table.to_tensors(),
            Self::Less(table) => table.to_tensors(),
            Self::Compactor(table) => table.to_tensors(),
        }
    }

    /// Back from tensors, checked against the shapes of a model: they may come from anywhere.
    ///
    /// # Errors
    /// [`CacheError::Table`]: tensors that are missing or have other shapes, numbers that are not finite.
    pub fn from_tensors(method: Method, geometry: &Geometry, tensors: Vec<Tensor>) -> Result<Self> {
        let wrong = |what| CacheError::Table { method: method.name(), what };
        if let Some(bad) = tensors.iter().find(|t| !t.data.iter().all(|x| x.is_finite())) {
            return Err(wrong(format!("{} has numbers that are not finite", bad.name)));
        }
        let source = Tensors { tensors };
        let low_rank = || LowRankTable::from_tensors(geometry, &source).map(Arc::new);
        match method {
            Method::Lorc => low_rank().map(Self::Lorc),
            Method::ReCalKv => low_rank().map(Self::ReCalKv),
            Method::KvSharer => KvSharerTable::from_tensors(geometry, &source)
                .map(|table| Self::KvSharer(table.into())),
            Method::Less => {
                LessTable::from_tensors(geometry, &source).map(|table| Self::Less(table.into()))
            }
            Method::Compactor => CompactorTable::from_tensors(&source).map(Self::Compactor),
        }
        .map_err(wrong)
    }
}

fn missing(method: Method) -> CacheError {
    let method = method.name();
    let what =
        format!("there is none of this model; `kvasir calibrate --method {method}` makes one");
    CacheError::Table { method, what }
}

/// Tensors by name.
struct Tensors {
    tensors: Vec<Tensor>,
}

impl Tensors {
    /// One of a known shape.
    fn get(&self, name: &str, shape: &[usize]) -> Result<&[f32], String> {
        let found = self.tensors.iter().find(|t| t.name == name);
        let found = found.ok_or_else(|| format!("{name} is missing"))?;
        if found.shape != shape || found.data.len() != shape.iter().product::<usize>() {
            return Err(format!("{name} is {:?}, not {shape:?}", found.shape));
        }
        Ok(&found.data)
    }
}

/// The tables that a cache has.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tables {
    tables: Vec<Table>,
}

impl Tables {
    /// Adds one; another of the same method goes.
    pub fn add(&mut self, table: Table) {
        self.tables.retain(|t| t.method() != table.method());
        self.tables.push(table);
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// That of a method.
    pub fn get(&self, method: Method) -> Option<&Table> {
        self.tables.iter().find(|t| t.method() == method)
    }

    /// Axes of a method that has some.
    ///
    /// # Errors
    /// [`CacheError::Table`] if there are none.
    pub(crate) fn low_rank(&self, method: Method) -> Result<&Arc<LowRankTable>> {
        match self.get(method) {
            Some(Table::Lorc(table) | Table::ReCalKv(table)) => Ok(table),
            _ => Err(missing(method)),
        }
    }

    /// Layers that may read another's.
    ///
    /// # Errors
    /// [`CacheError::Table`] if that is not known.
    pub(crate) fn kv_sharer(&self) -> Result<&Arc<KvSharerTable>> {
        match self.get(Method::KvSharer) {
            Some(Table::KvSharer(table)) => Ok(table),
            _ => Err(missing(Method::KvSharer)),
        }
    }

    /// How much of a prompt's worth a share of it keeps.
    ///
    /// # Errors
    /// [`CacheError::Table`] if that is not known.
    pub(crate) fn compactor(&self) -> Result<CompactorTable> {
        match self.get(Method::Compactor) {
            Some(Table::Compactor(table)) => Ok(*table),
            _ => Err(missing(Method::Compactor)),
        }
    }

    /// Networks of LESS.
    ///
    /// # Errors
    /// [`CacheError::Table`] if there are none.
    pub(crate) fn less(&self) -> Result<&Arc<LessTable>> {
        match self.get(Method::Less) {
            Some(Table::Less(table)) => Ok(table),
            _ => Err(missing(Method::Less)),
        }
    }
}
