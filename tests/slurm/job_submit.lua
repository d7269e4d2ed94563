-- Refuse what Taiwania 2 refuses: no account, no GPU, more than 4 CPUs or 90 GB for a GPU,
-- express for anything but industrial and personal projects (man.twcc.ai, guide-twnia2-queue-zh).
local CPUS_PER_GPU, MB_PER_GPU = 4, 90 * 1024

local function gpus_in(tres)
    if tres == nil then return 0 end
    local count = 0
    for word in string.gmatch(tres, "[^,]+") do
        if string.find(word, "gpu") then
            count = count + (tonumber(string.match(word, "gpu[^,]*:(%d+)$")) or 1)
        end
    end
    return count
end

local function known(number, unknown)
    if number == nil or number >= unknown then return nil end
    return number
end

local function refuse(text)
    slurm.log_user(text)
    return slurm.ERROR
end

function slurm_job_submit(job, partitions, uid)
    local account, partition = job.account or "", job.partition or "gtest"
    if not string.find(account, "^%u%u%u%d+$") then
        return refuse("Account required: sbatch --account=PROJECT_ID, such as MST109001")
    end
    if partition == "express" and string.sub(account, 1, 3) == "MST" then
        return refuse("Partition express is not for projects of MST")
    end
    local nodes = known(job.min_nodes, slurm.NO_VAL) or 1
    local tasks = known(job.num_tasks, slurm.NO_VAL) or nodes
    local gpus = math.max(
        gpus_in(job.tres_per_node) * nodes, gpus_in(job.tres_per_task) * tasks,
        gpus_in(job.tres_per_job)
    )
    if gpus < 1 then return refuse("Every job needs a GPU: sbatch --gres=gpu:1") end
    local per_node = known(job.ntasks_per_node, slurm.NO_VAL16) or 0
    tasks = math.max(tasks, per_node * nodes)
    local cpus = tasks * (known(job.cpus_per_task, slurm.NO_VAL16) or 1)
    if cpus > CPUS_PER_GPU * gpus then
        return refuse(string.format("%d CPUs for %d GPUs: at most 4 for each", cpus, gpus))
    end
    local memory = known(job.min_mem_per_node, slurm.NO_VAL64)
    if memory and memory * nodes > MB_PER_GPU * gpus then
        return refuse(string.format("%d MB a node: at most 90 GB for each GPU", memory))
    end
    return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
    return slurm.SUCCESS
end

return slurm.SUCCESS
