//! URLs: what the user typed, where a redirect leads, who may get credentials, and what a file is called.

use std::path::PathBuf;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderValue, Uri};
use percent_encoding::percent_decode_str;
use sha2::{Digest, Sha256};

use super::error::GetError;

/// A URL without user information, and the credentials that it carried.
pub(super) struct Parsed {
    pub(super) uri: Uri,
    pub(super) basic: Option<HeaderValue>,
}

/// Reads an absolute `http` or `https` URL.
pub(super) fn parse(text: &str) -> Result<Parsed, GetError> {
    let bad = |why: &str| GetError::Usage(format!("{}: {why}", redact(text)));
    let uri: Uri = text
        .parse()
        .map_err(|error| bad(&format!("not a URL: {error}")))?;
    let mut parts = uri.into_parts();
    if !parts
        .scheme
        .as_ref()
        .is_some_and(|s| *s == Scheme::HTTP || *s == Scheme::HTTPS)
    {
        return Err(bad(
            "not a URL that can be downloaded: begin it with http:// or https://",
        ));
    }
    let Some(authority) = parts.authority else {
        return Err(bad("the URL names no host"));
    };
    let (user, host) = match authority.as_str().rsplit_once('@') {
        Some((user, host)) => (Some(user.to_owned()), host.to_owned()),
        None => (None, authority.to_string()),
    };
    let host: Authority = host
        .parse()
        .map_err(|_| bad("the URL's host is malformed"))?;
    if host.host().is_empty() {
        return Err(bad("the URL names no host"));
    }
    parts.authority = Some(host);
    parts
        .path_and_query
        .get_or_insert(PathAndQuery::from_static("/"));
    let basic = user.map(|user| {
        let (login, password) = user.split_once(':').unwrap_or((&user, ""));
        basic(
            &percent_decode_str(login).collect::<Vec<u8>>(),
            &percent_decode_str(password).collect::<Vec<u8>>(),
        )
    });
    let uri = Uri::from_parts(parts).map_err(|error| bad(&format!("not a URL: {error}")))?;
    Ok(Parsed { uri, basic })
}

/// An `Authorization` field value (RFC 7617) that no debug output shows.
pub(super) fn basic(login: &[u8], password: &[u8]) -> HeaderValue {
    let pair = [login, b":", password].concat();
    let value = format!("Basic {}", BASE64_STANDARD.encode(pair));
    let mut value = HeaderValue::from_str(&value).expect("base64 is visible ASCII");
    value.set_sensitive(true);
    value
}

/// A URL as messages show it: without user information, query and fragment, where credentials live.
pub(super) fn redact(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = authority
                .rsplit_once('@')
                .map_or(authority, |(_, host)| host);
            format!("{scheme}://{host}{path}")
        }
        None => url.to_owned(),
    }
}

/// Where `location` leads from `base` (RFC 3986 §5.2; RFC 9110 §10.2.2). User information in it is dropped.
pub(super) fn resolve(base: &Uri, location: &str) -> Result<Uri, GetError> {
    let location = location.split('#').next().unwrap_or_default();
    let scheme = base.scheme_str().unwrap_or("http");
    let authority = base.authority().map_or("", Authority::as_str);
    let has_scheme = location
        .split_once(':')
        .is_some_and(|(scheme, _)| !scheme.is_empty() && !scheme.contains(['/', '?']));
    let absolute = if has_scheme {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.is_empty() {
        base.to_string()
    } else if location.starts_with('?') {
        format!("{scheme}://{authority}{}{location}", base.path())
    } else {
        let directory = base
            .path()
            .rsplit_once('/')
            .map_or("", |(directory, _)| directory);
        let (path, query) = location.split_at(location.find('?').unwrap_or(location.len()));
        let path = remove_dot_segments(&format!("{directory}/{path}"));
        format!("{scheme}://{authority}{path}{query}")
    };
    parse(&absolute).map(|parsed| parsed.uri).map_err(|_| {
        GetError::Protocol(format!(
            "{}: the server redirects to {:?}, which is no http(s) URL",
            redact(&base.to_string()),
            redact(location)
        ))
    })
}

fn remove_dot_segments(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "." => {}
            ".." => drop(kept.pop()),
            _ => kept.push(segment),
        }
        if matches!(segment, "." | "..") && segments.peek().is_none() {
            kept.push("");
        }
    }
    format!("/{}", kept.join("/"))
}

/// Whether what was meant for `origin` may be sent to `target`: the same host, port and scheme, or the same
/// host's move from plain HTTP to TLS on the default ports.
pub(super) fn same_origin(origin: &Uri, target: &Uri) -> bool {
    let port = |uri: &Uri| {
        let usual = if uri.scheme() == Some(&Scheme::HTTPS) {
            443
        } else {
            80
        };
        uri.port_u16().unwrap_or(usual)
    };
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    let upgraded = (port(origin), port(target)) == (80, 443);
    host(origin) == host(target)
        && (upgraded || (origin.scheme() == target.scheme() && port(origin) == port(target)))
}

/// Tells downloads of different objects apart, where their tags might not: two files that nginx serves can have the same
/// modification time and length, hence the same ETag. A digest, since queries can hold secrets;
/// without the fields of a signature, so that a freshly signed URL resumes what an expired one began.
pub(super) fn identity(uri: &Uri) -> String {
    let query: Vec<&str> = uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter(|field| {
            let name = field
                .split('=')
                .next()
                .unwrap_or_default()
                .to_ascii_lowercase();
            !name.starts_with("x-amz-") && !name.starts_with("x-goog-")
        })
        .collect();
    let scheme = uri.scheme_str().unwrap_or_default();
    let authority = uri
        .authority()
        .map_or("", Authority::as_str)
        .to_ascii_lowercase();
    let text = format!("{scheme}://{authority}{}?{}", uri.path(), query.join("&"));
    BASE64_STANDARD.encode(Sha256::digest(text))
}

/// The file that a URL without `-o` is saved to, in the working directory: the last path segment, percent-decoded.
/// Characters that would lead elsewhere or hide something (separators, controls, a leading dot or dash) become `_`.
pub(super) fn file_name(uri: &Uri) -> Result<PathBuf, GetError> {
    let segment = uri.path().rsplit('/').next().unwrap_or_default();
    let decoded = percent_decode_str(segment).decode_utf8_lossy();
    let mut name: String = decoded
        .chars()
        .map(|c| {
            if c.is_control() || matches!(c, '/' | '\\') {
                '_'
            } else {
                c
            }
        })
        .collect();
    if name.is_empty() || name.chars().all(|c| c == '.') {
        return Err(GetError::Usage(format!(
            "{}: the URL names no file; say where to with -o FILE",
            redact(&uri.to_string())
        )));
    }
    if name.starts_with(['.', '-']) {
        name.replace_range(..1, "_");
    }
    Ok(name.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        parse(text).unwrap().uri
    }

    #[test]
    fn credentials_leave_the_url() {
        let parsed = parse("http://me:p%40ss@host:81/a?b").unwrap();
        assert_eq!(parsed.uri, "http://host:81/a?b");
        assert_eq!(parsed.basic.as_ref().unwrap(), "Basic bWU6cEBzcw==");
        assert!(!format!("{:?}", parsed.basic).contains("bWU6"));
        assert_eq!(
            redact("https://me:pw@host/a/b?X-Amz-Signature=1#f"),
            "https://host/a/b"
        );
        assert_eq!(redact("http://me:pw@host"), "http://host");
        for bad in [
            "host/a",
            "ftp://host/a",
            "file:///etc/passwd",
            "/a",
            "http:///a",
            "http://:80/",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn redirects_resolve_as_rfc_3986_says() {
        let base = uri("http://h/a/b/c?q");
        for (location, want) in [
            ("https://x/y#f", "https://x/y"),
            ("//x/y", "http://x/y"),
            ("/y?z=http://e/", "http://h/y?z=http://e/"),
            ("d", "http://h/a/b/d"),
            ("../d?e", "http://h/a/d?e"),
            ("../../../d", "http://h/d"),
            ("./", "http://h/a/b/"),
            ("..", "http://h/a/"),
            ("?z", "http://h/a/b/c?z"),
            ("http://u:p@x/", "http://x/"),
        ] {
            assert_eq!(resolve(&base, location).unwrap(), want, "{location}");
        }
        assert!(resolve(&base, "ftp://x/").is_err());
        assert!(resolve(&base, "javascript:1").is_err());
    }

    #[test]
    fn secrets_stay_at_home() {
        let home = uri("http://h/a");
        assert!(same_origin(&home, &uri("http://H:80/b")));
        assert!(same_origin(&home, &uri("https://h/b")));
        assert!(!same_origin(&home, &uri("http://h:8080/")));
        assert!(!same_origin(&home, &uri("http://h.evil/")));
        assert!(!same_origin(&uri("https://h/a"), &uri("http://h/a")));
    }

    #[test]
    fn a_new_signature_is_no_new_object() {
        let id = |text| identity(&uri(text));
        assert_eq!(
            id("http://h/a?X-Amz-Signature=1&x-amz-date=2"),
            id("http://h/a?X-Amz-Signature=3")
        );
        assert_ne!(id("http://h/a?id=1"), id("http://h/a?id=2"));
        assert_ne!(id("http://h/a"), id("http://h/b"));
        assert_ne!(id("http://h/a"), id("http://i/a"));
    }

    #[test]
    fn file_names_cannot_lead_elsewhere() {
        for (url, want) in [
            ("http://h/a/model.bin?x=/y", "model.bin"),
            ("http://h/a%20b%C3%A9", "a bé"),
            ("http://h/..%2F..%2Fetc%2Fpasswd", "_._.._etc_passwd"),
            ("http://h/.bashrc", "_bashrc"),
            ("http://h/-rf", "_rf"),
            ("http://h/a%00b%0Ac%5Cd", "a_b_c_d"),
        ] {
            assert_eq!(file_name(&uri(url)).unwrap(), PathBuf::from(want), "{url}");
        }
        for url in [
            "http://h",
            "http://h/",
            "http://h/a/",
            "http://h/%2E%2E",
            "http://h/..",
        ] {
            assert!(file_name(&uri(url)).is_err(), "{url}");
        }
    }
}
