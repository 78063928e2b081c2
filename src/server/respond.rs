//! Every status code there is: the only module that names one.

use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};

use super::body::ResponseBody;

// === admin ===

/// The admin listener's answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AdminStatus {
    /// Here it is.
    Ok,
    /// The request makes no sense.
    Malformed,
    /// A browser sent it on behalf of a web page.
    CrossOrigin,
    /// No such page, or nothing is mounted at the path.
    NotFound,
    /// Only these methods.
    Allow(&'static str),
    /// The request's body is longer than it has any reason to be.
    TooLarge,
    /// It went wrong on our side.
    Failed,
    /// Not ready: starting or draining.
    Unready,
}

/// An answer of the admin listener.
pub(super) fn admin(
    status: AdminStatus,
    content_type: &'static str,
    body: impl Into<bytes::Bytes>,
) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::bytes(body));
    *response.status_mut() = match status {
        AdminStatus::Ok => StatusCode::OK,
        AdminStatus::Malformed => StatusCode::BAD_REQUEST,
        AdminStatus::CrossOrigin => StatusCode::FORBIDDEN,
        AdminStatus::NotFound => StatusCode::NOT_FOUND,
        AdminStatus::Allow(_) => StatusCode::METHOD_NOT_ALLOWED,
        AdminStatus::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        AdminStatus::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        AdminStatus::Unready => StatusCode::SERVICE_UNAVAILABLE,
    };
    let fields = response.headers_mut();
    fields.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    fields.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let AdminStatus::Allow(methods) = status {
        fields.insert(ALLOW, HeaderValue::from_static(methods));
    }
    response
}
