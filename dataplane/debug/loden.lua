-- Lets Wireshark see through our datagrams: udp mode on 8285 (a bare IP packet of either version) and VXLAN on 8472,
-- the port of the kernel's device; Wireshark itself knows 4789 only. Installed by `loden extcap install`.

local udp_mode = Proto("loden_udp", "Loden udp mode")
local ipv4, ipv6 = Dissector.get("ip"), Dissector.get("ipv6")

function udp_mode.dissector(payload, info, tree)
    if payload:len() == 0 then return 0 end
    local version = payload(0, 1):bitfield(0, 4)
    local inner = version == 4 and ipv4 or version == 6 and ipv6 or nil
    if inner == nil then return 0 end
    tree:add(udp_mode, payload(0, 0))
    return inner:call(payload, info, tree)
end

local ports = DissectorTable.get("udp.port")
ports:add(8285, udp_mode)
ports:add(8472, ports:get_dissector(4789))
