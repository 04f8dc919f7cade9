//! Text to tokens and back. (Skeleton: signatures are final, bodies follow.)

/// A model's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {}
