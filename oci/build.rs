//! Generates the Ferry service's messages, server and client from `proto/ferry.proto`.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() {
    let out = std::env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/ferry.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(Customize { async_all: true, ..Default::default() })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()
        .expect("generate the Ferry service");
    // protobuf's generator lists the messages only.
    let modules = "pub mod ferry;\npub mod ferry_ttrpc;\n";
    std::fs::write(std::path::Path::new(&out).join("mod.rs"), modules).expect("write mod.rs");
    println!("cargo:rerun-if-changed=proto/ferry.proto");
}
