// SPDX-License-Identifier: GPL-2.0

//! `vhost-blk probe`: is this host ready?

use std::fmt;
use std::fs;
use std::io::{self, BufRead, BufReader, Write as _};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use kvm_ioctls::Kvm;
use serde::Serialize;
use vhost_blk_ring::device::Device;
use vhost_blk_ring::uapi::{self, Info, feature};

use crate::args::ProbeArgs;

/// The oldest kernel that the module builds for.
const MINIMUM_KERNEL: (u32, u32) = (7, 2);

/// How one aspect of the host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Ok,
    Failed,
    /// It depends on another one that failed.
    Unknown,
}

/// One aspect of the host.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Check {
            name,
            state: State::Ok,
            detail: detail.into(),
            advice: None,
        }
    }

    fn failed(name: &'static str, detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Check {
            name,
            state: State::Failed,
            detail: detail.into(),
            advice: Some(advice.into()),
        }
    }

    fn unknown(name: &'static str, detail: impl Into<String>) -> Self {
        Check {
            name,
            state: State::Unknown,
            detail: detail.into(),
            advice: None,
        }
    }
}

/// What the module says about itself.
#[derive(Debug, Serialize)]
struct Module {
    abi_version: u32,
    capabilities: Vec<&'static str>,
    max_virtqueues: u32,
    max_queue_size: u32,
    device_bytes: u32,
    queue_bytes: u32,
    slot_bytes: u32,
    features: Vec<String>,
    features_mask: String,
}

impl Module {
    fn new(info: &Info, features: u64) -> Self {
        let mut capabilities = Vec::new();
        if info.capabilities & uapi::VHOST_BLK_CAP_WRITEBACK != 0 {
            capabilities.push("WRITEBACK");
        }
        Module {
            abi_version: info.abi_version,
            capabilities,
            max_virtqueues: info.max_virtqueues,
            max_queue_size: info.max_queue_size,
            device_bytes: info.device_bytes,
            queue_bytes: info.queue_bytes,
            slot_bytes: info.slot_bytes,
            features: feature::names(features),
            features_mask: format!("{features:#x}"),
        }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    ready: bool,
    checks: Vec<Check>,
    #[serde(skip_serializing_if = "Option::is_none")]
    module: Option<Module>,
}

/// Looks at everything, prints it, and returns whether the host is ready.
pub(crate) fn run(device: &Path, args: &ProbeArgs) -> Result<bool> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default();
    let opened = Device::open(device);
    let mut checks = vec![
        kernel(&release),
        rust(&release),
        module(&release),
        node(device, &opened),
    ];
    let (interface, module) = interface(opened.ok().as_ref());
    checks.extend([interface, kvm(), qemu(&args.qemu)]);
    let report = Report {
        ready: checks.iter().all(|check| check.state == State::Ok),
        checks,
        module,
    };
    let text = if args.json {
        serde_json::to_string_pretty(&report)? + "\n"
    } else {
        report.to_string()
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(report.ready)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let state = match check.state {
                State::Ok => "ok",
                State::Failed => "NOT OK",
                State::Unknown => "?",
            };
            writeln!(f, "{state:<7} {:<10} {}", check.name, check.detail)?;
            for line in check.advice.iter().flat_map(|advice| advice.lines()) {
                writeln!(f, "{:<18} -> {line}", "")?;
            }
        }
        if let Some(module) = &self.module {
            writeln!(f, "\n{module}")?;
        }
        let ready = if self.ready { "ready" } else { "not ready" };
        writeln!(f, "\nThis host is {ready}.")
    }
}

impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Interface version {}, up to {} virtqueues of up to {} descriptors.",
            self.abi_version, self.max_virtqueues, self.max_queue_size
        )?;
        writeln!(
            f,
            "Memory: {} bytes per open device, {} per virtqueue, {} per request slot.",
            self.device_bytes, self.queue_bytes, self.slot_bytes
        )?;
        writeln!(f, "Capabilities: {}.", self.capabilities.join(" "))?;
        write!(
            f,
            "Features ({}): {}.",
            self.features_mask,
            self.features.join(" ")
        )
    }
}

fn kernel(release: &str) -> Check {
    let (major, minor) = MINIMUM_KERNEL;
    match version(release) {
        Some(found) if found >= MINIMUM_KERNEL => Check::ok("kernel", release),
        Some(_) => Check::failed(
            "kernel",
            format!("{release} is older than {major}.{minor}"),
            "Boot a newer kernel; on Debian 13, that of trixie-backports:\n\
             apt install -t trixie-backports linux-image-amd64",
        ),
        None => Check::failed(
            "kernel",
            format!("'{release}' is not a release"),
            "Is /proc mounted?",
        ),
    }
}

/// The first two numbers of a kernel release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn rust(release: &str) -> Check {
    const NAME: &str = "rust";
    let configs = [
        format!("/boot/config-{release}"),
        format!("/lib/modules/{release}/config"),
        format!("/lib/modules/{release}/build/.config"),
    ];
    for path in &configs {
        if let Ok(config) = fs::read_to_string(path) {
            return rust_answer(config.lines().any(|line| line == "CONFIG_RUST=y"), path);
        }
    }
    // Without a configuration file, the symbols of the kernel's Rust crates tell.
    match fs::File::open("/proc/kallsyms") {
        Ok(file) => {
            let found = BufReader::new(file)
                .lines()
                .map_while(io::Result::ok)
                .any(|line| is_rust_symbol(&line));
            rust_answer(found, "/proc/kallsyms")
        }
        Err(error) => Check::failed(
            NAME,
            format!("neither the kernel's configuration nor its symbols are there: {error}"),
            format!("Put the configuration to {}", configs[0]),
        ),
    }
}

/// Whether a line of `/proc/kallsyms` is a mangled Rust name, of the kernel itself.
fn is_rust_symbol(line: &str) -> bool {
    let mut words = line.split_whitespace().skip(2);
    words.next().is_some_and(|name| name.starts_with("_R")) && words.next().is_none()
}

fn rust_answer(found: bool, source: &str) -> Check {
    if found {
        Check::ok("rust", format!("CONFIG_RUST=y ({source})"))
    } else {
        Check::failed(
            "rust",
            format!("this kernel has no support for Rust modules ({source})"),
            "Boot a kernel with CONFIG_RUST=y; Debian's kernels from trixie-backports have it.",
        )
    }
}

fn module(release: &str) -> Check {
    const NAME: &str = "module";
    if Path::new("/sys/module/vhost_blk").is_dir() {
        let version = fs::read_to_string("/sys/module/vhost_blk/version");
        return match version {
            Ok(version) => Check::ok(NAME, format!("vhost_blk {} is loaded", version.trim())),
            Err(_) => Check::ok(NAME, "vhost_blk is loaded"),
        };
    }
    let list = fs::read_to_string(format!("/lib/modules/{release}/modules.dep"));
    match list.ok().as_deref().and_then(installed) {
        Some(path) => Check::failed(
            NAME,
            format!("vhost_blk is installed ({path}) but not loaded"),
            "modprobe vhost-blk",
        ),
        None => Check::failed(
            NAME,
            "vhost_blk is neither loaded nor installed",
            "In the source of vhost-blk: make && make install && modprobe vhost-blk",
        ),
    }
}

/// Where `modules.dep` says that our module is.
fn installed(list: &str) -> Option<&str> {
    list.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, _)| path)
        .find(|path| {
            let file = path.rsplit('/').next().unwrap_or(path);
            let name = file.split_once(".ko").map(|(name, _)| name);
            matches!(name, Some("vhost-blk" | "vhost_blk"))
        })
}

fn node(path: &Path, opened: &vhost_blk_ring::Result<Device>) -> Check {
    const NAME: &str = "node";
    let shown = path.display();
    let error = match opened {
        Ok(_) => return Check::ok(NAME, format!("{shown} can be opened")),
        Err(error) => error,
    };
    let detail = error.to_string();
    match error.errno() {
        Some(libc::ENOENT) => Check::failed(
            NAME,
            detail,
            "The node appears when the module is loaded (with udev or devtmpfs).",
        ),
        Some(libc::EACCES | libc::EPERM) => Check::failed(
            NAME,
            detail,
            format!("Run as root, or give your user the right: setfacl -m u:$USER:rw {shown}"),
        ),
        Some(libc::ENXIO | libc::ENODEV) => Check::failed(
            NAME,
            detail,
            format!("The node is a stale one: remove {shown} and load the module."),
        ),
        _ => {
            let is_node = fs::metadata(path).is_ok_and(|meta| meta.file_type().is_char_device());
            let advice = if is_node {
                "See what the kernel says: dmesg | tail"
            } else {
                "This is no device node: remove it and load the module."
            };
            Check::failed(NAME, detail, advice)
        }
    }
}

fn interface(device: Option<&Device>) -> (Check, Option<Module>) {
    const NAME: &str = "interface";
    let Some(device) = device else {
        return (Check::unknown(NAME, "the node cannot be opened"), None);
    };
    let answers = device
        .info(None)
        .and_then(|info| Ok((info, device.get_features()?)));
    let (info, features) = match answers {
        Ok(answers) => answers,
        Err(error) => {
            let advice =
                "This is another or an older driver: load vhost-blk of this tool's version.";
            return (Check::failed(NAME, error.to_string(), advice), None);
        }
    };
    let check = if info.abi_version < uapi::VHOST_BLK_ABI_VERSION {
        Check::failed(
            NAME,
            format!(
                "version {} is older than this tool's, {}",
                info.abi_version,
                uapi::VHOST_BLK_ABI_VERSION
            ),
            "Load the module of this tool's version.",
        )
    } else if features & feature::VERSION_1 == 0 {
        Check::failed(
            NAME,
            format!("features {features:#x} lack VERSION_1"),
            "Load the module of this tool's version.",
        )
    } else {
        Check::ok(NAME, format!("version {}", info.abi_version))
    };
    (check, Some(Module::new(&info, features)))
}

fn kvm() -> Check {
    const NAME: &str = "kvm";
    const NO_KVM: &str = "Guests run in emulation only (-accel tcg), many times slower.";
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let advice = match error.errno() {
                libc::ENOENT => format!("modprobe kvm_intel, or kvm_amd. {NO_KVM}"),
                libc::EACCES | libc::EPERM => {
                    "Add your user to the group kvm, and log in again: adduser $USER kvm".into()
                }
                _ => NO_KVM.into(),
            };
            return Check::failed(NAME, format!("cannot open /dev/kvm: {error}"), advice);
        }
    };
    let vm = match kvm.create_vm() {
        Ok(vm) => vm,
        Err(error) => {
            return Check::failed(
                NAME,
                format!("cannot create a virtual machine: {error}"),
                NO_KVM,
            );
        }
    };
    if let Err(error) = vm.create_vcpu(0) {
        return Check::failed(
            NAME,
            format!("cannot create a virtual CPU: {error}"),
            NO_KVM,
        );
    }
    // There are hosts whose /dev/kvm does all this and runs nothing but their own kernels.
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if cfg!(target_arch = "x86_64") && !has_virtualisation(&cpuinfo) {
        return Check::failed(
            NAME,
            "/dev/kvm works, but the processor has neither vmx nor svm",
            format!("Switch virtualisation on in the firmware, or in the hypervisor. {NO_KVM}"),
        );
    }
    Check::ok(NAME, "a virtual machine with a CPU can be created")
}

/// Whether `/proc/cpuinfo` has one of the two extensions of x86.
fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| {
            line.split_whitespace()
                .any(|flag| matches!(flag, "vmx" | "svm"))
        })
}

fn qemu(program: &Path) -> Check {
    const NAME: &str = "qemu";
    const BUILD: &str =
        "Build QEMU with the patches of vhost-blk (qemu/build), and name it: --qemu PROGRAM";
    let Some(path) = find_program(program, std::env::var_os("PATH").as_deref()) else {
        return Check::failed(NAME, format!("{} is not there", program.display()), BUILD);
    };
    let output = match Command::new(&path)
        .args(["-device", "vhost-blk-pci,help"])
        .output()
    {
        Ok(output) => output,
        Err(error) => {
            return Check::failed(NAME, format!("{}: {error}", path.display()), BUILD);
        }
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    if output.status.success() && said.contains("num-queues=") {
        Check::ok(NAME, format!("{} has vhost-blk-pci", path.display()))
    } else {
        // QEMU itself says which device it does not know; anything else that
        // keeps it from answering is said here too.
        let reason = complaint.lines().last().unwrap_or("it says nothing of it");
        Check::failed(
            NAME,
            format!("{} has no vhost-blk-pci: {reason}", path.display()),
            BUILD,
        )
    }
}

/// Finds `program` as a shell does.
fn find_program(program: &Path, path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    std::env::split_paths(path?)
        .map(|folder| folder.join(program))
        .find(|candidate| candidate.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_have_versions() {
        assert_eq!(version("7.3.4+deb13-cloud-amd64"), Some((7, 3)));
        assert_eq!(version("6.12.0"), Some((6, 12)));
        assert_eq!(version("8.0-rc1"), Some((8, 0)));
        assert_eq!(version(""), None);
        assert_eq!(version("x"), None);
        assert_eq!(kernel("7.2.1").state, State::Ok);
        assert_eq!(kernel("8.0.1").state, State::Ok);
        assert_eq!(kernel("7.1.9").state, State::Failed);
        assert_eq!(kernel("").state, State::Failed);
    }

    #[test]
    fn rust_symbols() {
        assert!(is_rust_symbol("0000000000000000 T _RNvNtCs1_6kernel5print"));
        assert!(!is_rust_symbol(
            "0000000000000000 T _RNvNtCs1_6kernel5print\t[rnull]"
        ));
        assert!(!is_rust_symbol("0000000000000000 T vhost_dev_init"));
        assert!(!is_rust_symbol(""));
    }

    #[test]
    fn modules_are_found() {
        let list = "kernel/drivers/vhost/vhost.ko.xz: kernel/drivers/vhost/vhost_iotlb.ko.xz\n\
                    updates/vhost-blk.ko: kernel/drivers/vhost/vhost.ko.xz\n";
        assert_eq!(installed(list), Some("updates/vhost-blk.ko"));
        assert_eq!(
            installed("extra/vhost_blk.ko.zst:\n"),
            Some("extra/vhost_blk.ko.zst")
        );
        assert_eq!(
            installed("extra/my-vhost-blk.ko:\nx.ko: vhost-blk.ko\n"),
            None
        );
        assert_eq!(installed(""), None);
    }

    #[test]
    fn processors_with_virtualisation() {
        assert!(has_virtualisation("processor: 0\nflags\t\t: fpu svm de\n"));
        assert!(has_virtualisation("flags : vmx\n"));
        assert!(!has_virtualisation(
            "flags : fpu vmxoff\nvmx flags : vnmi\n"
        ));
        assert!(!has_virtualisation(""));
    }

    #[test]
    fn programs_are_found() {
        let path = std::env::join_paths(["/nonexistent", "/bin"]).expect("no colons");
        assert!(find_program(Path::new("sh"), Some(&path)).is_some());
        assert!(find_program(Path::new("/bin/sh"), None).is_some());
        assert!(find_program(Path::new("sh"), None).is_none());
        assert!(find_program(Path::new("no-such-program"), Some(&path)).is_none());
    }

    #[test]
    fn a_missing_node_comes_with_advice() {
        let path = Path::new("/nonexistent/vhost-blk");
        let check = node(path, &Device::open(path));
        assert_eq!(check.state, State::Failed);
        assert!(check.detail.contains("/nonexistent/vhost-blk"));
        assert!(check.advice.is_some_and(|advice| advice.contains("loaded")));
        let (check, module) = interface(None);
        assert_eq!(check.state, State::Unknown);
        assert!(module.is_none());
    }

    #[test]
    fn reports_print_all_checks() {
        let report = Report {
            ready: false,
            checks: vec![
                Check::ok("kernel", "7.3"),
                Check::failed("node", "not there", "load it\nnow"),
                Check::unknown("interface", "no node"),
            ],
            module: Some(Module::new(&Info::default(), feature::FLUSH)),
        };
        let text = report.to_string();
        for part in [
            "kernel",
            "NOT OK",
            "-> load it",
            "-> now",
            "FLUSH",
            "not ready",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json = serde_json::to_value(&report).expect("plain data");
        assert_eq!(json["ready"], false);
        assert_eq!(json["checks"][1]["state"], "failed");
        assert_eq!(json["module"]["features"][0], "FLUSH");
    }
}
