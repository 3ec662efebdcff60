"""The Chinese words of SLAKE's questions and answers, and how its English ones say them. Used by demo_chinese.py."""

from __future__ import annotations

SIDES = {
    **dict.fromkeys(("左侧", "左边", "左"), "left"),
    **dict.fromkeys(("右侧", "右边", "右"), "right"),
    **dict.fromkeys(("左上侧", "左上角", "左上部", "左上"), "upper left"),
    **dict.fromkeys(("右上侧", "右上角", "右上部", "右上"), "upper right"),
    **dict.fromkeys(("左下侧", "左下角", "左下"), "lower left"),
    **dict.fromkeys(("右下侧", "右下角", "右下"), "lower right"),
    **dict.fromkeys(("顶部", "上方", "上部"), "top"),
    "底部": "bottom",
    **dict.fromkeys(("中心", "中部", "中间"), "center"),
}
ORGANS = {
    **dict.fromkeys(("肺", "肺脏", "肺部"), "lung"),
    **dict.fromkeys(("脑", "大脑", "脑部"), "brain"),
    **dict.fromkeys(("左肾", "左肾脏", "左侧肾脏"), "left kidney"),
    **dict.fromkeys(("右肾", "右肾脏", "右侧肾脏"), "right kidney"),
    **dict.fromkeys(("食管", "食道"), "esophagus"),
    **dict.fromkeys(("喉", "喉部"), "larynx"),
    **dict.fromkeys(("下颌骨", "下颚"), "mandible"),
    **dict.fromkeys(("眼", "眼睛"), "eyes"),
    "左肺": "left lung",
    "右肺": "right lung",
    "心脏": "heart",
    "肝脏": "liver",
    "脾脏": "spleen",
    "肾脏": "kidney",
    "胃": "stomach",
    "小肠": "small bowel",
    "大肠": "large bowel",
    "结肠": "colon",
    "直肠": "rectum",
    "十二指肠": "duodenum",
    "膀胱": "bladder",
    "脊髓": "spinal cord",
    "脑干": "brain stem",
    "颞叶": "temporal lobe",
    "左颞叶": "left temporal lobe",
    "右颞叶": "right temporal lobe",
    "气管": "trachea",
    "腮腺": "parotid",
    "牙齿": "tooth",
    "耳朵": "ears",
    "股骨头": "femoral head",
    "左股骨头": "left femoral head",
    "肱骨头": "humerus head",
    "肺支气管": "pulmonary bronchus",
}
# Counted, they are in the plural.
MANY = {name: f"{name}s" for name in ("kidney", "lung", "parotid", "mandible", "temporal lobe", "femoral head")}
PARTS = {
    **dict.fromkeys(("头部", "头"), "head"),
    "大脑": "brain",
    "胸腔": "chest",
    "腹部": "abdomen",
    "颈部": "neck",
    "盆腔": "pelvic cavity",
}
DISEASES = {
    "肺癌": "lung cancer",
    "肝癌": "liver cancer",
    "肾癌": "kidney cancer",
    "心脏肥大": "cardiomegaly",
    "气胸": "pneumothorax",
    "肺不张": "atelectasis",
    "肺炎": "pneumonia",
    "积液": "effusion",
    "胸腔积液": "pleural effusion",
    "结节": "nodule",
    "肺结节": "pulmonary nodule",
    "肿块": "mass",
    "肺肿块": "pulmonary mass",
    "浸润": "infiltration",
    "肺浸润": "pulmonary infiltration",
    "脑水肿": "brain edema",
    **dict.fromkeys(("脑瘤", "脑肿瘤", "脑部肿瘤"), "brain tumor"),
    **dict.fromkeys(("增强型脑肿瘤", "脑部增强型肿瘤", "脑部增强肿瘤"), "brain enhancing tumor"),
    "非增强型脑肿瘤": "brain non-enhancing tumor",
}
LUNGS = {f"{there}肺": f"{side} lung" for there, side in SIDES.items() if side.split()[-1] in ("left", "right") and len(there) < 3}
LOBES = {f"{there}叶": f"{side} lobe" for there, side in SIDES.items() if side.split()[-1] in ("left", "right") and len(there) < 3}
PLACES = {**SIDES, **LUNGS, **LOBES, "双肺": "both lung", "左胸": "left chest", "右胸": "right chest", "不存在": "not seen"}
PLACES |= {zh: ORGANS[zh] for zh in ("心脏", "肝脏", "肾脏", "左肺", "右肺")}
PLACES |= {"相对于脊髓左右对称": "symmetrical to the spine", "直肠上方": "above the rectum", "气管下方": "under the trachea"}
PLACES |= {"环绕膀胱": "around the bladder"}
USES = {
    "呼吸": "breathing",
    "感知光线效果": "sensing light",
    "吸收养分": "absorbing nutrients",
    "排出废物": "discharging waste",
    "接收声音": "receiving sound",
    "消化食物": "digesting food",
    "运送气体": "gas delivery",
    "提高机体免疫力": "improving the body's immunity",
    "排泄粪便": "excreting feces",
    "解毒": "detoxicating",
    "分泌酶": "secreting enzymes",
    "存储尿液": "storing urine",
    "调节水及渗透压平衡": "adjusting water and osmotic pressure balance",
    "排泄机体废物质": "excreting body waste",
    "推动血液流动": "promoting blood flow",
}
SYSTEMS = {
    "呼吸系统": "respiratory system",
    "循环系统": "circulatory system",
    "消化系统": "digestive system",
    "神经系统": "nervous system",
    "泌尿系统": "urinary system",
    "淋巴系统": "lymphatic system",
    "感觉器官": "sensory organs",
}
COLOURS = {"黑色": "black", "灰色": "gray", "白色": "white", "深灰色": "dark gray", "浅灰色": "light grey"}
SHAPES = {"椭圆": "oval", "椭圆形": "oval", "不规则": "irregular", "圆形": "circular", "U形": "U-shaped"}
MODALITIES = {"CT": "CT", "MRI": "MRI", "核磁共振": "MRI", "X-Ray": "X-Ray", "X光": "X-Ray"}
PLANES = {"横断面": "transverse plane", "冠状面": "coronal plane", "矢状面": "sagittal plane"}
YES = ("包含", "包括", "是的", "是", "有", "存在", "可以", "健康", "正常")
NO = ("不包含", "不包括", "不是", "否", "没有", "不存在", "不可以", "不正常", "无异常")
POLAR = {**dict.fromkeys(YES, "yes"), **dict.fromkeys(NO, "no")}
SENTENCES = {
    "药物治疗,手术治疗": "Medical treatment, surgical treatment",
    "药物治疗": "Medical treatment",
    "药物治疗,支持性治疗": "Medical therapy, supportive therapy",
    "物理治疗,手术治疗": "Physical therapy, surgical treatment",
    "药物治疗,康复治疗": "Pharmacotherapy, rehabilitation",
    "药物治疗,支持治疗,手术治疗": "Medical treatment, supportive treatment, surgical treatment",
    "健康生活,保持身体健康": "Live healthy, enhance physical fitness",
    "保持健康体质": "Keep healthy",
    "烟,增强体质": "Quit smoking, enhance physical fitness",
    "忌烟,避免剧烈运动": "Quit smoking, avoid strenuous exercise",
    "注防寒保暖,增强体质": "Pay attention to prevent cold and keep warm, enhance physical fitness",
    "注意饮食卫生,加强身体素质,避免脑部外伤": "Pay attention to dietary hygiene, strengthen physical fitness and avoid brain trauma",
    "及时治疗脑部疾病,保持身体健康": "Treat brain diseases promptly, keep healthy",
    "胸痛,咳嗽,咳痰": "Chest pain, cough, expectoration",
    "咳泡沫黏液痰,呼吸困难,咳嗽,胸痛": "Cough foamy mucus sputum, dyspnea, cough, chest pain",
    "胸闷,心律失常": "Chest tightness, arrhythmia",
    "胸闷,乏力": "Chest tightness, fatigue",
    "呼吸困难,咳血,胸痛": "Dyspnea, hemoptysis, chest pain",
    "胸闷,气急,呼吸困难,干咳": "Chest tightness, shortness of breath, difficulty breathing, dry cough",
    "胸痛,呼吸困难": "Chest pain, dyspnea",
    "视力障碍,呕吐,耳鸣,颅内压增高": "Visual impairment, vomiting, tinnitus, increased intracranial pressure",
    "胸部损伤,肺部疾病,肺大疱": "Chest injury, lung disease, bullae",
    "肺部感染,慢性刺激": "Pulmonary infection, chronic irritation",
    "肺部感染、肺部肿瘤、肺结核等疾病导致": "Pulmonary infection, lung tumor, tuberculosis and other diseases",
    "高血压,扩张性心肌病": "Hypertension, dilated cardiomyopathy",
    "支气管腔内阻塞": "Bronchial obstruction",
    "脑胚胎组织发育异常,遗传因素,化学因素": "Brain embryonic tissue dysplasia, genetic factors, chemical factors",
    "颅脑损伤,颅内占位性病变,颅内炎症,脑血管病变,脑缺氧": "Craniocerebral injury, intracranial space-occupying lesions, "
    "intracranial inflammation, cerebrovascular lesions, cerebral hypoxia",
    "呼吸": "Breathe",
    "推动血液流动": "Promote blood flow",
    "控制心跳和呼吸": "Control heartbeat and breathing",
    "参与听觉、言语和记忆": "Participate in hearing, speech and memory",
    "通气,发音": "Ventilation, pronunciation",
    "吸收水分,排泄机体废物质": "Absorb water, excrete body waste",
    "生物转化、解毒": "Biotransformation, detoxification",
    "吸收营养,分泌酶,消化食物": "Absorb nutrients, secrete enzymes, digest food",
    "提高机体免疫力": "Improve the body's immunity",
    "消化食物,分泌酶": "Digest food, secrete enzymes",
    "储存粪便,排泄粪便": "Store feces, excrete feces",
    "储存尿液": "Store urine",
    "消化食物,吸收水分,排泄机体废物质": "Digest food, absorb water, excrete body waste",
    "切咬,咀嚼,保持面部外形和辅助发音": "Cutting, chewing, maintaining facial contour and assisting pronunciation",
    "运送气体": "Gas delivery",
}
