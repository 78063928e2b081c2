# Varnish keeps whole objects in memory and cuts ranges from them. It does not look at If-Match.
vcl 4.1;
backend origin {
    .host = "127.0.0.1";
    .port = "@origin";
    .first_byte_timeout = 300s;
}
sub vcl_recv {
    # For a HEAD, Varnish would fetch the whole object: to ask whether it is up would fill it.
    if (req.method == "HEAD") {
        return (pass);
    }
}
sub vcl_backend_response {
    set beresp.ttl = 1h;
    set beresp.do_stream = true;
}
