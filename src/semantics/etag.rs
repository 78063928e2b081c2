//! Entity tags (RFC 9110 §8.8.3). (skeleton)

/// An entity tag. No `PartialEq`: callers choose [`EntityTag::strong_eq`] or [`EntityTag::weak_eq`].
#[derive(Clone)]
pub struct EntityTag {
    weak: bool,
    opaque: Box<[u8]>,
}

impl EntityTag {
    /// A strong tag with this opaque part (without quotes).
    pub fn strong(opaque: &[u8]) -> Self {
        Self { weak: false, opaque: opaque.into() }
    }
    /// Whether it starts with `W/`.
    pub fn is_weak(&self) -> bool {
        self.weak
    }
    /// What stands between the quotes.
    pub fn opaque(&self) -> &[u8] {
        &self.opaque
    }
    /// RFC 9110 §8.8.3.2: both strong and the same.
    pub fn strong_eq(&self, other: &Self) -> bool {
        !self.weak && !other.weak && self.opaque == other.opaque
    }
    /// RFC 9110 §8.8.3.2: the same opaque part.
    pub fn weak_eq(&self, other: &Self) -> bool {
        self.opaque == other.opaque
    }
}

/// The value of `If-Match` or `If-None-Match`.
#[derive(Clone)]
#[expect(clippy::exhaustive_enums, reason = "closed by RFC 9110 §13.1.1")]
pub enum EntityTagList {
    /// `*`
    Any,
    /// At least one tag.
    Tags(Vec<EntityTag>),
}
